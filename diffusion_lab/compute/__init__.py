"""Where work runs: devices and precision, ranks, launching, SLURM, sharding, the global batch."""
