"""Sinusoids: noise levels and patch positions as vectors (arXiv:1706.03762)."""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import Flag, Positive, Range, optional, ranges, whole

MAX_PERIOD = 10000
EVEN = Range("an even number above 2", lambda n: whole(4).allows(n) and n % 2 == 0, 256)
ROTARY_PERIOD = 100.0  # a grid has tens of rows, not thousands of words


def sinusoid(value: Tensor, width: int, closed: bool = False) -> Tensor:
    """Cosines and sines of value (n,) at width / 2 frequencies from 1 to 1 / 10000, (n, width).

    The last frequency is a step short of 1 / 10000, or exactly that if the range is `closed`.
    float32, even under autocast: bfloat16 cannot distinguish neighbouring noise levels' labels.
    """
    half = width // 2
    exponent = torch.arange(half, device=value.device, dtype=torch.float32) / (half - closed)
    angle = value[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def grid_coordinates(rows: int, columns: int) -> Tensor:
    """Row and column of each patch in row-major order, (rows * columns, 2) float32."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def grid_positions(rows: int, columns: int, width: int, sines_first: bool = False) -> Tensor:
    """Fixed 2-D positions in row-major order, (rows * columns, width): half column, half row.

    In each half the cosines come first, or the sines.
    """
    row, column = grid_coordinates(rows, columns).unbind(1)
    halves = [sinusoid(axis, width // 2) for axis in (column, row)]
    if sines_first:
        halves = [half.roll(width // 4, dims=1) for half in halves]
    return torch.cat(halves, dim=1)


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

    def waves(self, noise: Tensor) -> Tensor:
        """noise (B,) -> the input of the MLP (B, frequencies), float32."""
        return sinusoid(noise, self.frequencies)

    def forward(self, noise: Tensor, added: Tensor | None = None) -> Tensor:
        """noise (B,), and what is added to the MLP's input (B, frequencies) -> (B, width)."""
        waves = self.waves(noise)
        return super().forward(waves if added is None else waves + added)


class UNetEmbedding(NoiseEmbedding):
    """The noise embedding of a U-Net, as wide as 4 times its `channels` unless `width` is given.

    None for `frequencies`, the numbers in the sinusoid, is `channels`; `closed` is explained at
    `sinusoid`. The condition is added to the output of the MLP, or to its input if it comes `first`
    (arXiv:2011.13456).
    """

    @ranges()
    def __init__(
        self,
        channels: int,
        frequencies: Annotated[int | None, optional(EVEN)] = None,
        width: Annotated[int | None, optional(whole(1))] = None,
        closed: Flag = False,
        condition_first: Flag = False,
    ):
        width = width or 4 * channels
        super().__init__(frequencies or channels, width)
        self.width = width
        self.closed = closed
        self.condition_first = condition_first
        self.condition_width = self.frequencies if condition_first else width

    def waves(self, noise: Tensor) -> Tensor:
        return sinusoid(noise, self.frequencies, self.closed)


class FourierEmbedding(UNetEmbedding):
    """Random frequencies, normally distributed with deviation `std` in cycles (arXiv:2006.10739).

    They are drawn once and saved with the weights.
    """

    @ranges()
    def __init__(
        self,
        channels: int,
        frequencies: Annotated[int | None, optional(EVEN)] = None,
        width: Annotated[int | None, optional(whole(1))] = None,
        std: Positive = 16.0,
        condition_first: Flag = False,
    ):
        super().__init__(channels, frequencies, width, condition_first=condition_first)
        self.cycles = nn.Buffer(std * torch.randn(self.frequencies // 2))

    def waves(self, noise: Tensor) -> Tensor:
        angle = noise[:, None] * (2 * math.pi * self.cycles)
        return torch.cat([angle.cos(), angle.sin()], dim=1)
