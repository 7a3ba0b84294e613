"""What is made of trained runs: samples, sweeps, memorisation, comparison."""
