"""Points in the plane as images of two channels and one pixel: diffusion that can be plotted."""

from abc import abstractmethod

import torch
from torch import Tensor

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
        """Draws the points, the same on every machine."""
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
