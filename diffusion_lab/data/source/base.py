"""A data source: a training and a test split of images, each one tensor."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from diffusion_lab.common.images import grid
from diffusion_lab.common.labels import TEXT, Labels, labels_of
from diffusion_lab.common.ranges import IMAGE_SHAPE, Range, optional, ranges, whole
from diffusion_lab.data.source.acquire import DataError

LABEL_SIZE = Range(
    f"a number of at least 0, {TEXT} or null",
    lambda value: value == TEXT or optional(whole(0)).allows(value),
    1,
)


class Split(NamedTuple):
    """Images uint8 (N, C, H, W) at their native size, and labels.

    Labels are classes, int64 (N,), or K numbers each, float32 (N, K), or of another kind of Labels.
    """

    images: Tensor
    labels: Tensor


class DataSource(ABC):
    """A source of images; `load` is the one method to write."""

    native_shape: tuple[int, int, int]  # (C, H, W), known before the images are read
    class_names: tuple[str, ...]  # in the order of the labels; empty for images without labels
    values_per_label: int | str = 0  # K, if labels are vectors of numbers; text for captions

    @property
    def labels(self) -> Labels:
        """The meaning of the labels."""
        return labels_of(self.values_per_label, self.class_names)

    @abstractmethod
    def load(self) -> tuple[Split, Split]:
        """Reads the training and the test split; raises DataError."""

    def prepare(self) -> None:
        """Fetches or finds the files on the first process of a machine; raises DataError."""
        return None

    def check(self, splits: tuple[Split, Split]) -> None:
        """Raises ValueError unless both splits are of the shapes and types that `Split` says."""
        name, shape = type(self).__name__, self.native_shape
        for split, (images, labels) in zip(("training", "test"), splits, strict=True):
            if images.dtype != torch.uint8 or tuple(images.shape[1:]) != tuple(shape):
                raise ValueError(
                    f"the {split} images of {name} are {images.dtype} {tuple(images.shape)}; "
                    f"`load` must return uint8 (N, {', '.join(map(str, shape))}), with 0 black and "
                    "255 white"
                )
            if len(images) == 0:
                raise ValueError(f"{name} has no {split} images; `load` must return both splits")
            wanted = self.labels.dtype, (len(images), *self.labels.shape)
            if (labels.dtype, tuple(labels.shape)) != wanted:
                raise ValueError(
                    f"the {split} labels of {name} are {labels.dtype} {tuple(labels.shape)}; "
                    f"`load` must return {wanted[0]} {wanted[1]}, as its labels are "
                    f"{type(self.labels).__name__}"
                )

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError unless labels that are classes are places in `class_names`."""
        try:
            self.labels.check(labels)
        except ValueError as error:
            raise ValueError(f"the labels of {type(self).__name__} {error}") from error

    def facts(self) -> dict[str, object]:
        """Arguments inferred from files, with which a saved run opens where its data are not."""
        return {}

    def picture(self, images: Tensor, columns: int) -> Tensor:
        """Tiles images (N, C, H, W) to one picture, uint8 (1 or 3, height, width), in `columns`."""
        return grid(images, columns)


class Absent(DataSource):
    """The facts of images of `image_shape` (C, H, W) in `num_classes` classes, without images.

    `label_size` is how many numbers a label is, or text; 0 for classes.
    """

    @ranges()
    def __init__(
        self,
        image_shape: Annotated[Sequence[int], IMAGE_SHAPE],
        num_classes: Annotated[int, whole(0)],
        label_size: Annotated[int | str, LABEL_SIZE] = 0,
    ):
        channels, height, width = image_shape
        self.native_shape = (channels, height, width)
        self.class_names = tuple(map(str, range(num_classes)))
        self.values_per_label = label_size

    def prepare(self) -> None:
        """Raises DataError, which says how a network is imported with its images."""
        raise DataError(
            "the images of this network are not known, so nothing can be compared with them; "
            "import it with data=... of the same size and classes"
        )

    def load(self) -> tuple[Split, Split]:
        raise NotImplementedError("`prepare` has raised")
