"""A data source: a training and a test split of images that fit into memory."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from diffusion_lab.common.images import grid


class Split(NamedTuple):
    """Images uint8 (N, C, H, W) at their native size, and labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class DataSource(ABC):
    """Where images come from; `load` is the one method to write.

    A source whose number of images is its user's affair sets `sizes_vary`: what is held out is
    then reduced to the test images that there are, where other sources refuse.
    """

    native_shape: tuple[int, int, int]  # (C, H, W), known before the images are read
    class_names: tuple[str, ...]  # in the order of the labels; none for images without labels
    sizes_vary = False

    @abstractmethod
    def load(self) -> tuple[Split, Split]:
        """Reads the training and the test split; raises DataError."""

    def prepare(self) -> None:
        """Fetches or finds the files on the first process of a machine; raises DataError."""
        return None

    def facts(self) -> dict[str, object]:
        """Values of the constructor for what was inferred from files, for a run to keep.

        With them a run is opened where its data are not.
        """
        return {}

    def picture(self, images: Tensor, columns: int) -> Tensor:
        """One picture, uint8 (1 or 3, height, width), of images (N, C, H, W), `columns` a row."""
        return grid(images, columns)
