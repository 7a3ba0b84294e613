"""Augmentation of training images that does not leak into samples (arXiv:2206.00364, F.2).

A network is told by nine values what was done to its image, so that zeros, which samples are drawn
with, mean an image as it is. B batch, C channels, H height, W width in pixels.
"""

import math
from dataclasses import astuple
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.ranges import Flag, Fraction, at_least, between, settings

# values of a label by transformation: flips, scale, rotation, anisotropy, translation
VALUES = (1, 1, 1, 2, 2, 2)
Deviation = Annotated[float, at_least(0)]


@settings
class NonLeaky:
    """EDM's: flips, then an affine map: scaled, then turned, then stretched, then shifted.

    With `flip_x` half of all images are mirrored; each other part is for an image with
    `probability`, in [0, 1], whatever the other parts are. `flip_y` turns half of these upside
    down; `scale` is the standard deviation of log2 of the factor; `rotation` the largest angle in
    degrees; `anisotropy` the deviation of log2 of the factor along an axis of any direction, by
    which the other axis is divided; `translation` that of the shift, in sides of the image. 0 or
    false switches a part off.

    A label holds: mirrored, upside down; log2 of the factor over its deviation; cos - 1 and sin of
    the angle, counter-clockwise; the axis, as long as its log2 factor over the deviation; the shift
    to the right and down over its deviation.
    """

    values = sum(VALUES)  # of a label

    probability: Fraction
    flip_x: Flag
    flip_y: Flag
    scale: Deviation
    rotation: Annotated[float, between(0, 180)]
    anisotropy: Deviation
    translation: Deviation

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) float in [-1, 1] -> images of that kind, and their labels (B, 9).

        The generator, if given, is on the CPU.
        """
        labels = self.draw(len(images), generator)
        return self.apply(images, labels), labels.to(images.device)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """What to do to `count` images, (count, 9) float32, 0 where nothing is done.

        On the CPU: every device does the same, and none is waited for.
        """
        rand = partial(torch.rand, generator=generator, dtype=torch.float32)
        p = self.probability
        done = rand((count, len(VALUES))) < torch.tensor([1.0, p, p, p, p, p])
        _, *strengths = astuple(self)
        done &= torch.tensor(strengths).bool()
        mirrored, turned = (rand((2, count)) < 0.5).to(torch.float32)
        angle, axis = math.pi * (2 * rand((2, count)) - 1)
        angle = angle * self.rotation / 180
        size, stretch, right, down = torch.randn(
            (4, count), generator=generator, dtype=torch.float32
        )
        # no less than 0, or a label would mean a stretch or its inverse; as often, by symmetry
        stretch = stretch.abs()
        label = torch.stack(
            [
                mirrored,
                turned,
                size,
                angle.cos() - 1,
                angle.sin(),
                stretch * axis.cos(),
                stretch * axis.sin(),
                right,
                down,
            ],
            dim=1,
        )
        return label * done.repeat_interleave(torch.tensor(VALUES), dim=1)

    def apply(self, images: Tensor, labels: Tensor) -> Tensor:
        """Does to images (B, C, H, W) what their labels (B, 9), on the CPU, say."""
        for axis, flipped in ((-1, labels[:, 0]), (-2, labels[:, 1])):
            flipped = flipped.bool().to(images.device)[:, None, None, None]
            images = torch.where(flipped, images.flip(axis), images)
        (moved,) = labels[:, 2:].any(1).nonzero(as_tuple=True)
        if len(moved):
            matrix = self.way_back(labels[moved], *images.shape[2:]).to(images.device)
            moved = moved.to(images.device)
            images[moved] = resample(images[moved], matrix)
        return images

    def way_back(self, labels: Tensor, height: int, width: int) -> Tensor:
        """From a pixel to where it was, both from the centre, right and down: (B, 2, 3) float32."""
        # float64, which autocast leaves alone
        _, _, size, cos, sin, across, along, right, down = labels.double().unbind(1)
        shrink = (-self.scale * size).exp2()[:, None, None]
        turn = _matrix(cos + 1, -sin, sin, cos + 1)  # back, where y points down
        length = torch.hypot(across, along)
        axis = torch.atan2(along, across)
        lengthen = (self.anisotropy * length).exp2()
        cos, sin = axis.cos(), axis.sin()
        axes = _matrix(cos, sin, -sin, cos)  # y points down here, too
        squeeze = axes @ torch.diag_embed(torch.stack([1 / lengthen, lengthen], 1)) @ axes.mT
        matrix = shrink * turn @ squeeze
        shift = self.translation * torch.stack([right * width, down * height], dim=1)
        return torch.cat([matrix, -matrix @ shift[:, :, None]], dim=2).to(torch.float32)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices (B, 2, 2) of rows a b and c d, from (B,) each."""
    return torch.stack([a, b, c, d], dim=1).unflatten(1, (2, 2))


def resample(images: Tensor, way_back: Tensor) -> Tensor:
    """images (B, C, H, W) in [-1, 1], each pixel taken from where `way_back` (B, 2, 3) leads.

    Bicubic; beyond its edges an image goes on as its mirror image.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    places = [
        # sums and not a product of matrices, which autocast would round to bf16
        (row[:, 0] * x + row[:, 1] * y + row[:, 2]) * 2 / side
        for row, side in zip(way_back[..., None, None].unbind(1), (width, height), strict=True)
    ]  # (B, H, W) each, in [-1, 1] from edge to edge
    grid = torch.stack(places, dim=3)
    resampled = F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return resampled.clamp(-1, 1)  # bicubic overshoots at edges


def augment(augmentation: NonLeaky | None, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """images (B, C, H, W) uint8 as a network is trained on, and their labels (B, 9), if any.

    Images that nothing is done to come out as they were.
    """
    if augmentation is None:
        return images, None
    images, labels = augmentation(to_float(images))
    return to_uint8(images), labels  # as the data are, for any first stage
