"""Learned uncertainty: how large a loss is to be expected at each noise level."""

import math

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.diffusion.noise import NoiseLevel


class LearnedUncertainty(nn.Module):
    """u(level), for a loss of exp(-u) L + u, least at u = log E[L] (arXiv:2312.02696, equation 14).

    Every level then counts equally, however large its loss. u is linear in `channels` Fourier
    features of log(sigma / alpha) / 4, and 0 at the start.
    """

    @ranges(channels=whole(1))
    def __init__(self, channels: int = 128):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, level: NoiseLevel) -> Tensor:
        """u, (B,) float32, on the weight's device."""
        # pure noise is at infinity; levels beyond e^10 need not be distinguished
        log_ratio = (-level.logsnr / 2).clamp(-10, 10)
        position = (log_ratio / 4).to(self.weight.device, torch.float32)
        # normal frequencies and uniform phases as in the paper, but evenly spaced and not drawn
        count = torch.arange(len(self.weight), device=position.device, dtype=torch.float32)
        frequency = torch.special.ndtri((count + 0.5) / len(count))
        phase = count * (math.sqrt(5) - 1) / 2
        features = (2 * math.pi * (position[:, None] * frequency + phase)).cos()  # (B, channels)
        # a sum instead of a matrix product, which autocast would round to bf16
        return math.sqrt(2) * (features * self.weight).sum(1)
