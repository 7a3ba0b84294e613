"""Run folders: configuration, checkpoints, weights, lock, results, opening, export."""
