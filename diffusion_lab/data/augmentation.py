"""Augmentation of training images.

One does not leak into samples (arXiv:2206.00364, F.2): nine values tell the network what was done
to its image; all zeros, as in sampling, stand for an unchanged image. Any other is a transform of
images, such as one of torchvision's v2, of which the network is not told. B batch, C channels,
H height, W width in pixels.
"""

import math
from dataclasses import astuple
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Flag, Fraction, at_least, between, settings

# number of label values of each step: flip_x, flip_y, scale, rotation, anisotropy, translation
VALUES = (1, 1, 1, 2, 2, 2)
Deviation = Annotated[float, at_least(0)]


@settings
class NonLeaky:
    """EDM's augmentation: flips, then an affine map that scales, rotates, stretches and shifts.

    With `flip_x` half of all images are mirrored. Each other step is applied with `probability`, in
    [0, 1], independently of the rest: `flip_y` turns half of those images upside down; `scale` is
    the standard deviation of log2 of the factor; `rotation` the largest angle in degrees;
    `anisotropy` the deviation of log2 of the factor along a random axis, by which the other axis is
    divided; `translation` the deviation of the shift, in sides of the image. 0 or false switches a
    step off.

    A label holds: mirrored, upside down; log2 of the scale factor over its deviation; cos - 1 and
    sin of the counter-clockwise angle; a vector along the stretched axis, of length log2 of the
    factor over its deviation; the shift right and down over its deviation.
    """

    values = sum(VALUES)  # number of values in a label

    probability: Fraction
    flip_x: Flag
    flip_y: Flag
    scale: Deviation
    rotation: Annotated[float, between(0, 180)]
    anisotropy: Deviation
    translation: Deviation

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Augments images (B, C, H, W) float in [-1, 1]; returns them and their labels (B, 9)."""
        labels = self.draw(len(images))
        return self.apply(images, labels), labels.to(images.device, non_blocking=True)

    def draw(self, count: int) -> Tensor:
        """Draws the labels of `count` images, (count, 9) float32, 0 where nothing is done.

        The draws are made on the CPU, so that every device gets the same and none has to wait.
        """
        rand = partial(torch.rand, dtype=torch.float32)
        p = self.probability
        done = rand((count, len(VALUES))) < torch.tensor([1.0, p, p, p, p, p])
        _, *strengths = astuple(self)
        done &= torch.tensor(strengths).bool()
        mirrored, turned = (rand((2, count)) < 0.5).to(torch.float32)
        angle, axis = math.pi * (2 * rand((2, count)) - 1)
        angle = angle * self.rotation / 180
        size, stretch, right, down = torch.randn((4, count), dtype=torch.float32)
        # absolute value: a label cannot show the sign; by symmetry shrinking is as frequent
        stretch = stretch.abs()
        turn = angle.cos() - 1, angle.sin()
        stretched = stretch * axis.cos(), stretch * axis.sin()
        label = torch.stack([mirrored, turned, size, *turn, *stretched, right, down], dim=1)
        return label * done.repeat_interleave(torch.tensor(VALUES), dim=1)

    def apply(self, images: Tensor, labels: Tensor) -> Tensor:
        """Transforms images (B, C, H, W) as their labels (B, 9), on the CPU, say."""
        for axis, flipped in ((-1, labels[:, 0]), (-2, labels[:, 1])):
            flipped = flipped.bool()[:, None, None, None].to(images.device, non_blocking=True)
            images = torch.where(flipped, images.flip(axis), images)
        (moved,) = labels[:, 2:].any(1).nonzero(as_tuple=True)
        if len(moved):
            matrix = self.way_back(labels[moved], *images.shape[2:])
            matrix, moved = (each.to(images.device, non_blocking=True) for each in (matrix, moved))
            images[moved] = resample(images[moved], matrix)
        return images

    def way_back(self, labels: Tensor, height: int, width: int) -> Tensor:
        """Maps each pixel to its source, both right and down of the centre: (B, 2, 3) float32."""
        # float64, which autocast leaves alone
        _, _, size, cos, sin, across, along, right, down = labels.double().unbind(1)
        shrink = (-self.scale * size).exp2()[:, None, None]
        turn = _matrix(cos + 1, -sin, sin, cos + 1)  # the inverse rotation, with y pointing down
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
    """Builds matrices (B, 2, 2) with the rows (a, b) and (c, d), from (B,) each."""
    return torch.stack([a, b, c, d], dim=1).unflatten(1, (2, 2))


def resample(images: Tensor, way_back: Tensor) -> Tensor:
    """Resamples images (B, C, H, W) in [-1, 1], each pixel from where `way_back` (B, 2, 3) leads.

    The interpolation is bicubic, and an image continues as its mirror image beyond its edges.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    places = [
        # sums instead of a matrix product, which autocast would round to bf16
        (row[:, 0] * x + row[:, 1] * y + row[:, 2]) * 2 / side
        for row, side in zip(way_back[..., None, None].unbind(1), (width, height), strict=True)
    ]  # (B, H, W) each, in [-1, 1] from edge to edge
    grid = torch.stack(places, dim=3)
    resampled = F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return resampled.clamp(-1, 1)  # bicubic overshoots at edges


Augmentation = NonLeaky | nn.Module  # a module maps one image, uint8 (C, H, W), to its like


def augment(augmentation: Augmentation | None, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Augments images (B, C, H, W) uint8; returns images of that type and labels (B, 9) or None.

    Images whose labels are 0 stay exactly the same. A module changes each image by itself.
    """
    if augmentation is None:
        return images, None
    if not isinstance(augmentation, NonLeaky):
        return torch.stack([augmentation(image) for image in images]), None
    images, labels = augmentation(to_float(images))
    return to_uint8(images), labels  # uint8 as the data, so that any first stage can take them


def mirrors(augmentation: object) -> bool:
    """Whether an augmentation, or one of those that it composes, mirrors images left to right."""
    kinds = {kind.__name__ for kind in type(augmentation).mro()}
    if "RandomHorizontalFlip" in kinds or getattr(augmentation, "flip_x", False):
        return True  # torchvision has two of that name
    parts = augmentation.children() if isinstance(augmentation, nn.Module) else ()
    return any(map(mirrors, (*getattr(augmentation, "transforms", ()), *parts)))


def check_augmentation(augmentation: Augmentation | None, shape: tuple[int, int, int]) -> None:
    """Raises UserError if a module does not map images of `shape` to uint8 images of that shape."""
    if augmentation is None or isinstance(augmentation, NonLeaky):
        return
    name = type(augmentation).__name__
    with torch.random.fork_rng(devices=()):
        try:
            changed = augmentation(torch.randint(256, shape, dtype=torch.uint8))
        except Exception as error:  # of code outside the package, whatever it is
            raise UserError(f"augmentation: {name} fails on an image ({error})") from error
    if not isinstance(changed, Tensor) or (changed.dtype, changed.shape) != (torch.uint8, shape):
        found = (
            f"{changed.dtype} {tuple(changed.shape)}" if isinstance(changed, Tensor) else changed
        )
        raise UserError(
            f"augmentation: {name} makes {found} of a uint8 image {tuple(shape)}; it must keep "
            "type and size, so leave out what resizes, normalises or converts images"
        )
