"""Autoencoders whose latent space a diffusion model can work in."""

from diffusion_lab.first_stage.autoencoder.base import Autoencoder, KLAutoencoder
from diffusion_lab.first_stage.autoencoder.vq import FSQAutoencoder, VQAutoencoder
