"""Fourier features of noise levels."""

import math

import torch
from torch import Tensor

from diffusion_lab.diffusion.noise import NoiseLevel


def level_features(level: NoiseLevel, channels: int, device: torch.device) -> Tensor:
    """Features of log(sigma / alpha) / 4 of levels (B,), (B, channels) float32 of unit variance."""
    # pure noise is at infinity; levels beyond e^10 need not be distinguished
    return features((-level.logsnr / 8).clamp(-2.5, 2.5), channels, device)


def features(position: Tensor, channels: int, device: torch.device) -> Tensor:
    """Cosines of a position (B,), whose frequencies have a deviation of one cycle.

    They are (B, channels) float32 of unit variance.
    """
    position = position.to(device, torch.float32)
    # normal frequencies and uniform phases as in EDM2, but evenly spaced and not drawn
    count = torch.arange(channels, device=device, dtype=torch.float32)
    frequency = torch.special.ndtri((count + 0.5) / channels)
    phase = count * (math.sqrt(5) - 1) / 2
    return math.sqrt(2) * (2 * math.pi * (position[:, None] * frequency + phase)).cos()
