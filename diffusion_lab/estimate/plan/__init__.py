"""A run on GPUs that are not here: its memory, time and disk, computed before it is queued."""
