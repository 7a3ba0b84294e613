"""Seams: how much more images change across the edges of patches than inside them.

A network that writes each patch by itself leaves seams, which FID sees only in part. B images,
C channels, H x W pixels.
"""

import torch
from torch import Tensor

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.metric import LOWER, Metric, Quantity, Values

EDGES = "edges"


def edge_gradients(images: Tensor, patch: int, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """The mean absolute differences of neighbouring pixels, (B, 2) float64: across edges, inside.

    The images are (B, C, H, W) in any unit; `corner` is the row and the column of their first pixel
    in the image that the network writes, whose patches have `patch` x `patch` pixels.
    """
    found = []
    for axis, first in zip((2, 3), corner, strict=True):
        steps = images.double().diff(dim=axis).abs()
        places = torch.arange(1, images.shape[axis], device=images.device) + first
        across = places % patch == 0
        found.append([steps.index_select(axis, m.nonzero()[:, 0]) for m in (across, ~across)])
    sides = ([rows.flatten(1), columns.flatten(1)] for rows, columns in zip(*found, strict=True))
    return torch.stack([torch.cat(side, dim=1).mean(1) for side in sides], dim=1)


class Seams(Metric):
    """The mean difference across the edges of patches over that inside of them.

    Real images have about 1; the value of test images stands beside it. Needs patches of at least 2
    pixels a side.
    """

    meaning = "change across the edges of patches over the change inside, compared with real images"
    quantities = (Quantity("seams", "Seams", meaning, LOWER, judged=False, tabled=True),)
    needs_images = False

    @ranges(patch=whole(2))
    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        across, inside = generated.others[EDGES].mean(0).tolist()
        return {"seams": across / inside} if inside else {}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.patch}px/{short_count(len(generated))}"
