"""diffusion_lab: compare diffusion models on equal terms."""

__version__ = "0.1.0"
