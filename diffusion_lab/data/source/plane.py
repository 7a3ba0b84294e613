"""Points in the plane as images of two channels and one pixel: diffusion that can be plotted."""

import math
from abc import abstractmethod
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import above, at_least, inside, settings
from diffusion_lab.data.source.base import DataSource, Split

TRAIN_SIZE, TEST_SIZE = 20_000, 2_000
SIDE = 256  # side of a picture in pixels: one pixel for each grey step of the data
COLOURS = ((42, 98, 168), (196, 78, 40))


class PointsInPlane(DataSource):
    """Points (x, y) in [-1, 1]^2, stored as uint8 like any image, in steps of 1 / 127.5."""

    native_shape = (2, 1, 1)

    @abstractmethod
    def points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws points (N, 2) float32 and their labels (N,) int64."""

    def load(self) -> tuple[Split, Split]:
        return self._drawn(TRAIN_SIZE, seed=0), self._drawn(TEST_SIZE, seed=1)

    def _drawn(self, count: int, seed: int) -> Split:
        points, labels = self.points(count, torch.Generator().manual_seed(seed))
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


MEANS = ((-0.5, -0.5), (0.5, 0.5))


@settings
class GaussianMixture(PointsInPlane):
    """Points around (-0.5, -0.5) and (0.5, 0.5), one class each, with standard deviation `std`.

    `share` of them lie around the first, so the two regions of the data are unequal.
    """

    class_names = ("lower left", "upper right")

    std: Annotated[float, above(0)] = 0.1
    share: Annotated[float, inside(0, 1)] = 0.2

    def points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws points of both Gaussians in their shares, at random."""
        labels = (torch.rand(count, generator=generator) >= self.share).long()
        noise = torch.randn(count, 2, generator=generator)
        return torch.tensor(MEANS)[labels] + self.std * noise, labels

    def log_density(self, points: Tensor, sigma: float = 0.0) -> Tensor:
        """The log density (N,) at points (N, 2); the data have noise of std `sigma`."""
        variance = self.std**2 + sigma**2
        squares = (points[:, None] - torch.tensor(MEANS).to(points)).square().sum(2)  # (N, 2)
        shares = torch.tensor([self.share, 1 - self.share]).to(points)
        logs = shares.log() - squares / (2 * variance)
        return logs.logsumexp(1) - torch.tensor(2 * torch.pi * variance).log()

    def score(self, points: Tensor, sigma: float = 0.0) -> Tensor:
        """The gradient of `log_density` at points (N, 2): (N, 2)."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_density(points, sigma).sum(), points)
        return gradient
