"""Checks of a training run before it starts: what is wrong, and what could be better."""
