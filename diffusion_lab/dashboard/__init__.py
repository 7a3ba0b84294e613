"""Weights & Biases around a run: names, the samples table, uploads, and a workspace to compare."""
