"""Exports to diffusers: networks, schedulers, a loop that samples, and a model card."""
