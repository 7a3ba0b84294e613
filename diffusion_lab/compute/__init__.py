"""The machine that work runs on: devices, precision, ranks, launching, SLURM, sharding, batches."""
