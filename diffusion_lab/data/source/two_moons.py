"""Two interleaved half circles of points in the plane."""

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import at_least, settings
from diffusion_lab.data.source.plane import PointsInPlane


@settings
class TwoMoons(PointsInPlane):
    """Two interleaved half circles, one per class, with Gaussian noise around them.

    `noise` is its standard deviation across the circle, whose radius is 0.5.
    """

    class_names = ("upper", "lower")

    noise: Annotated[float, at_least(0)] = 0.04

    def points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws equally many points of both half circles, in turn."""
        labels = torch.arange(count) % 2
        angle = math.pi * torch.rand(count, generator=generator)
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1) / 2
        points = torch.where(labels[:, None] == 0, upper, -upper)  # (N, 2)
        return points + self.noise * torch.randn(count, 2, generator=generator), labels
