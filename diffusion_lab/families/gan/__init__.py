"""Generative adversarial networks: a generator against a discriminator (arXiv:1406.2661)."""

from diffusion_lab.families.gan.generator import ConvGenerator, GANPipeline
from diffusion_lab.families.gan.relativistic import RelativisticLoss
