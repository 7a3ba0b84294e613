"""Generative adversarial networks: a generator against a discriminator (arXiv:1406.2661)."""

from diffusion_lab.families.gan.model import ConvGenerator, GANPipeline, RelativisticLoss
