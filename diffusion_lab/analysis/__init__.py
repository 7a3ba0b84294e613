"""Commands on trained runs: samples, sweeps, memorisation, comparison."""
