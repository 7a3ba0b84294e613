"""Chosen images of a tensor, of which only those in use are copied."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.common.images import pad_to


@dataclass(frozen=True)
class Rows:
    """The images at `places` (n,) of a tensor (N, C, H, W), padded to `pad` pixels if given."""

    images: Tensor
    places: Tensor
    pad: int | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Tensor:
        """Copies some of the images, in the order of `index`."""
        images = self.images[self.places[index]]
        return pad_to(images, self.pad) if self.pad else images

    def batches(self, size: int) -> Iterator[Tensor]:
        """Copies all images in order, `size` at a time."""
        return (self[ids] for ids in torch.arange(len(self)).split(size))


class LabelledRows(NamedTuple):
    """Images, and their n labels, as in a `Split`."""

    images: Rows
    labels: Tensor
