"""Sinusoids: noise levels and patch positions as vectors (arXiv:1706.03762)."""

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10000
ROTARY_PERIOD = 100.0  # a grid has tens of rows, not thousands of words


def sinusoid(value: Tensor, width: int) -> Tensor:
    """Cosines and sines of value (n,) at width / 2 frequencies from 1 to 1 / 10000, (n, width).

    float32, even under autocast: bfloat16 cannot distinguish neighbouring noise levels' labels.
    """
    half = width // 2
    exponent = torch.arange(half, device=value.device, dtype=torch.float32) / half
    angle = value[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def grid_coordinates(rows: int, columns: int) -> Tensor:
    """Row and column of each patch in row-major order, (rows * columns, 2) float32."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D positions in row-major order, (rows * columns, width): half column, half row."""
    row, column = grid_coordinates(rows, columns).unbind(1)
    return torch.cat([sinusoid(axis, width // 2) for axis in (column, row)], dim=1)


def rotary_angles(rows: int, columns: int, head_width: int) -> Tensor:
    """Angles of rotary positions, (rows * columns, head_width / 2): half row, half column.

    Raises ValueError if the head's width is not a multiple of 4 (arXiv:2104.09864, on two axes).
    """
    if head_width % 4:
        raise ValueError(
            f"positions=rotary needs a multiple of 4 channels per head, but these have {head_width}"
        )
    quarter = head_width // 4
    frequency = ROTARY_PERIOD ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    return (grid_coordinates(rows, columns)[:, :, None] * frequency).flatten(1)


class NoiseEmbedding(nn.Sequential):
    """A noise label (B,) as a vector (B, width): a sinusoid and a two-layer MLP."""

    def __init__(self, frequencies: int, width: int):
        super().__init__(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def forward(self, noise: Tensor) -> Tensor:
        """noise (B,) -> (B, width)."""
        return super().forward(sinusoid(noise, self.frequencies))
