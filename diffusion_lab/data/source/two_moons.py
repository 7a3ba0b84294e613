"""Points in the plane as images of two channels and one pixel: diffusion that can be plotted."""

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.images import to_float
from diffusion_lab.common.ranges import at_least, settings
from diffusion_lab.data.source.base import DataSource, Split

TRAIN_SIZE, TEST_SIZE = 20_000, 2_000
SIDE = 256  # side of a picture in pixels: one pixel for each grey step of the data
COLOURS = ((42, 98, 168), (196, 78, 40))


@settings
class TwoMoons(DataSource):
    """Two interleaved half circles, one per class, with Gaussian noise around them.

    A point (x, y) in [-1, 1]^2 is stored as uint8 like any image, in steps of 1 / 127.5; `noise` is
    its standard deviation across the circle, whose radius is 0.5.
    """

    native_shape = (2, 1, 1)
    class_names = ("upper", "lower")

    noise: Annotated[float, at_least(0)] = 0.04

    def load(self) -> tuple[Split, Split]:
        """Draws the points, the same on every machine."""
        return self._points(TRAIN_SIZE, seed=0), self._points(TEST_SIZE, seed=1)

    def _points(self, count: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        angle = math.pi * torch.rand(count, generator=generator)
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1) / 2
        points = torch.where(labels[:, None] == 0, upper, -upper)  # (N, 2)
        points = points + self.noise * torch.randn(count, 2, generator=generator)
        images = ((points + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Split(images[:, :, None, None], labels)

    def picture(self, images: Tensor, columns: int) -> Tensor:
        """Draws a scatter plot, uint8 (3, 256, 256), with a new colour every `columns` points."""
        across, up = images.flatten(1).long().cpu().unbind(1)  # (N,)
        picture = torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8)
        colours = torch.tensor(COLOURS, dtype=torch.uint8)
        turn = torch.arange(len(images)) // columns % len(COLOURS)
        picture[:, SIDE - 1 - up, across] = colours[turn].T
        return picture


def points_of(images: Tensor) -> Tensor:
    """Converts images (N, 2, 1, 1) to points (N, 2) float32 in [-1, 1]^2."""
    return to_float(images).flatten(1)
