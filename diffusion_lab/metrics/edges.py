"""How much images change across the edges of patches, and inside them.

B images, C channels, H x W pixels.
"""

import torch
from torch import Tensor

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
