"""Builds objects from a composed configuration, and refuses what cannot work."""
