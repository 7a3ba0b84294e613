"""Fourier features of noise levels."""

import math

import torch
from torch import Tensor

from diffusion_lab.diffusion.noise import NoiseLevel


def level_features(level: NoiseLevel, channels: int, device: torch.device) -> Tensor:
    """Features of log(sigma / alpha) / 4 of levels (B,), (B, channels) float32 of unit variance."""
    # pure noise is at infinity; levels beyond e^10 need not be distinguished
    log_ratio = (-level.logsnr / 2).clamp(-10, 10)
    position = (log_ratio / 4).to(device, torch.float32)
    # normal frequencies and uniform phases as in EDM2, but evenly spaced and not drawn
    count = torch.arange(channels, device=device, dtype=torch.float32)
    frequency = torch.special.ndtri((count + 0.5) / channels)
    phase = count * (math.sqrt(5) - 1) / 2
    return math.sqrt(2) * (2 * math.pi * (position[:, None] * frequency + phase)).cos()
