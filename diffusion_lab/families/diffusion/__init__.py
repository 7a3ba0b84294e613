"""Diffusion models: their networks, losses and samplers stand in rooms of their own."""
