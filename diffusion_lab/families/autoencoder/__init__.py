"""Autoencoders, whose networks and losses stand in `first_stage`."""
