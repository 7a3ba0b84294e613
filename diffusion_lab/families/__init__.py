"""Families of generative models other than diffusion: autoregressive ones, and GANs."""
