"""Sinusoids: noise levels and patch positions as vectors (arXiv:1706.03762)."""

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10000


def sinusoid(value: Tensor, width: int) -> Tensor:
    """Cosines and sines of value (n,) at width / 2 frequencies from 1 to 1 / 10000, (n, width).

    float32, under autocast too: bfloat16 cannot tell the labels of neighbouring noise levels apart.
    """
    half = width // 2
    exponent = torch.arange(half, device=value.device, dtype=torch.float32) / half
    angle = value[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D positions in row-major order, (rows * columns, width): half column, half row."""
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32),
        torch.arange(columns, dtype=torch.float32),
        indexing="ij",
    )
    return torch.cat([sinusoid(axis.flatten(), width // 2) for axis in (column, row)], dim=1)


class NoiseEmbedding(nn.Sequential):
    """A noise label (B,) as a vector (B, width): a sinusoid and a two-layer MLP."""

    def __init__(self, frequencies: int, width: int):
        super().__init__(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noise: Tensor) -> Tensor:
        """noise (B,) -> (B, width)."""
        return super().forward(sinusoid(noise, self[0].in_features))
