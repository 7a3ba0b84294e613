"""Autoencoders whose latent space a diffusion model can work in."""

from diffusion_lab.first_stage.autoencoder.base import Autoencoder
from diffusion_lab.first_stage.autoencoder.kl import KL
from diffusion_lab.first_stage.autoencoder.vq import FSQ, VQ

__all__ = ["FSQ", "KL", "VQ", "Autoencoder"]
