"""Learned uncertainty: how large a loss is to be expected at each noise level."""

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.diffusion.noise import NoiseLevel, features


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
        position = (-level.logsnr / 8).clamp(-2.5, 2.5)
        # a sum instead of a matrix product, which autocast would round to bf16
        return (features(position, len(self.weight), self.weight.device) * self.weight).sum(1)
