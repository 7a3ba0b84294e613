"""Autoencoders whose latent space a diffusion model can work in."""

from diffusion_lab.autoencoder.base import Autoencoder
from diffusion_lab.autoencoder.kl import KL
from diffusion_lab.autoencoder.vq import FSQ, VQ

__all__ = ["FSQ", "KL", "VQ", "Autoencoder"]
