"""Image data: facts, and the uint8 tensors themselves, in memory or mapped.

Lightning is left out, as commands on trained runs would wait seconds for it.
"""

from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.images import crop_to, pad_to
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import AUTO, Flag, Range, optional, settings, share, whole
from diffusion_lab.data.loader import EncodedImages, LabelledRows, Rows
from diffusion_lab.data.source.base import DataSource, Split

MOST_KEPT, SHARE_KEPT = 5000, 10  # auto: at most 5,000 validation images, and at most one in 10
VALIDATION_SIZE = Range(
    "auto, a whole number of at least 0 or null",
    lambda value: value in ("auto", None) or (type(value) is int and value >= 0),
    5000,
)


@settings
class ImageData:
    """The images of a source, as a model trains on them and metrics compare with them.

    `validation_size` images of the source's training split are for validation and never trained on
    (see `validation_and_rest`). Training uses the others, or the part of them given by `fraction`
    or `per_class`. The denoising loss is measured on `validate_on` validation images in training,
    and on equally many test images at its end. Metrics compare with the whole training split.
    `pad` is the height and width that the model sees.
    """

    source: DataSource
    pad: Annotated[int | None, optional(whole(1).as_in(32))] = None
    flip: Flag = False
    on_device: Annotated[bool | str, AUTO] = "auto"
    validation_size: Annotated[int | str | None, VALIDATION_SIZE] = "auto"
    validate_on: Annotated[int, whole(1).as_in(1000)] = 1000
    fraction: Annotated[float | None, optional(share().as_in(0.1))] = None
    per_class: Annotated[int | None, optional(whole(1).as_in(50))] = None
    subset_seed: Annotated[int, whole(0)] = 0

    def __post_init__(self) -> None:
        if self.fraction is not None and self.per_class is not None:
            raise ValueError(
                f"fraction={self.fraction} and per_class={self.per_class} both set the size of the "
                "subset; set one of them to null"
            )
        if self.pad is not None and self.pad < (side := max(self.native_shape[1:])):
            raise ValueError(
                f"pad={self.pad} is smaller than the images; use {side} or more, or null"
            )
        self.encoded: EncodedImages | None = None  # replaces the images in training, if set
        self.repeats_batch = False  # whether every training step has the images of the first

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of the images before padding."""
        return self.source.native_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return self.source.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) that the model sees, with padding."""
        return (self.native_shape[0], self.pad, self.pad) if self.pad else self.native_shape

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0, ..., num_classes - 1."""
        return len(self.class_names)

    @property
    def labels(self) -> Labels:
        """The meaning of the labels of the images."""
        return self.source.labels

    def classes_of(self, labels: Tensor) -> Tensor:
        """The classes (N,) int64 of labels; other labels are all of class 0."""
        return labels if self.num_classes else labels.new_zeros(len(labels), dtype=torch.int64)

    def reference_images(self) -> Tensor:
        """The whole training split, which metrics compare with: uint8 (M, C, H, W), native size."""
        return self._splits[0].images

    def reference_labels(self) -> Tensor:
        """The labels of `reference_images`."""
        return self._splits[0].labels

    def train_images(self) -> Tensor:
        """A copy of the images to train on, (N, C, H, W): not for validation, and in the subset."""
        return self.train_rows()[:]

    def train_rows(self, padded: bool = False) -> Rows:
        """The images of `train_images`, of which only those in use are copied."""
        return Rows(self._splits[0].images, self._chosen, self.pad if padded else None)

    def train_labels(self) -> Tensor:
        """The labels of `train_images`."""
        return self._splits[0].labels[self._chosen]

    def validation_rows(self) -> Rows:
        """The validation images in their stratified order, of native size."""
        return Rows(self._splits[0].images, self._divided[0])

    def validation_labels(self) -> Tensor:
        """The labels of `validation_rows`."""
        return self._splits[0].labels[self._divided[0]]

    def test_images(self) -> Tensor:
        """The test images, uint8 (N, C, H, W), native size."""
        return self._splits[1].images

    def test_labels(self) -> Tensor:
        """The labels of `test_images`."""
        return self._splits[1].labels

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all images and labels, in the subset or not: equal only for equal data."""
        return hashing.of_tensors(part for split in self._splits for part in split)

    @cached_property
    def images_fingerprint(self) -> str:
        """The sha256 of all images, without their labels."""
        return hashing.of_tensors(split.images for split in self._splits)

    def to_native(self, images: Tensor) -> Tensor:
        """Crops generated images (B, C, H, W) to the data's own size; a no-op without padding."""
        return crop_to(images, *self.native_shape[1:])

    def padded(self, images: Tensor) -> Tensor:
        """Pads images (N, C, H, W) of native size to the size that the model sees."""
        return pad_to(images, self.pad) if self.pad else images

    def require_test_images(self, count: int, argument: str) -> None:
        """Raises ValueError, naming `argument`, if there are fewer than `count` test images."""
        if count > (known := len(self.test_images())):
            few = f"{argument}={count} is more than the {known} test images"
            raise ValueError(f"{few}; use a smaller number")

    def first_tests(self, count: int) -> Split:
        """The first `count` test images, padded, and their labels."""
        return Split(self.padded(self.test_images()[:count]), self.test_labels()[:count])

    def trained_on(self, count: int) -> Split:
        """A fixed random choice of `count` training images, padded but unflipped, with labels."""
        # not the first, which may all be of one class
        index = self._chosen[random_places(len(self._chosen), count)]
        return Split(self.padded(self._splits[0].images[index]), self._splits[0].labels[index])

    def validated_on(self) -> LabelledRows:
        """The validation images of the validation loss, stratified and padded, and their labels."""
        return self._rows_of(0, self._divided[0][: self.validate_on])

    def tested_on(self) -> LabelledRows:
        """The test images of the test loss, stratified and padded, and their labels."""
        order = stratified(self.classes_of(self.test_labels()), "test")
        return self._rows_of(1, order[: self.validate_on])

    def _rows_of(self, split: int, places: Tensor) -> LabelledRows:
        images, labels = self._splits[split]
        return LabelledRows(Rows(images, places, self.pad), labels[places])

    def prepare_data(self) -> None:
        """Fetches or finds the files of the source; raises DataError."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Loads all images and takes the subset, so that no error in the data comes later."""
        _ = self._chosen

    def check_splits(self) -> None:
        """Raises ValueError unless both splits have the shapes and types that `Split` states."""
        self.source.check(self._splits)

    @cached_property
    def _splits(self) -> tuple[Split, Split]:
        return self.source.load()

    @cached_property
    def _divided(self) -> tuple[Tensor, Tensor]:
        """The places of the validation images and, sorted, of the others in the training split."""
        labels = self.classes_of(self._splits[0].labels)
        return validation_and_rest(labels, self.validation_size)

    @cached_property
    def _chosen(self) -> Tensor:
        """The places of the images to train on in the training split, sorted."""
        if self.per_class is not None and not self.num_classes:
            raise ValueError(
                f"per_class={self.per_class} needs classes, and these images have none; write "
                "data.fraction instead"
            )
        rest = self._divided[1]
        classes = self.classes_of(self._splits[0].labels[rest])
        index = subset(classes, self.fraction, self.per_class, self.subset_seed)
        return rest if index is None else rest[index]


def validation_and_rest(labels: Tensor, size: int | str | None) -> tuple[Tensor, Tensor]:
    """The indices of the validation images, stratified, and those of all others, sorted.

    The images have labels (N,) int64. `size` is a number, "auto" for 5,000 or for a tenth of the
    images if that is less, or None for none. The choice depends on nothing but the labels and
    `size`, and a smaller one lies inside a larger one. Raises ValueError if no image remains.
    """
    images = len(labels)
    kept = min(MOST_KEPT, images // SHARE_KEPT) if size == "auto" else int(size or 0)
    if kept >= images:
        raise ValueError(
            f"validation_size={kept} leaves none of {images} training images to train on; write "
            "a smaller number, or auto for a tenth of them or 5,000, whichever is less"
        )
    order = stratified(labels, "validation") if kept else torch.arange(images)
    return order[:kept], order[kept:].sort().values


def stratified(labels: Tensor, name: str) -> Tensor:
    """Orders images with labels (N,) int64: their indices (N,), random but fixed by `name`.

    Among the first n of them each class has its share of all images, as nearly as possible.
    """
    hashes = [hashing.of_text(f"{name}/{i}") for i in range(len(labels))]
    places: dict[int, tuple[float, str]] = {}
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten().tolist()
        for rank, i in enumerate(sorted(index, key=hashes.__getitem__)):
            # shuffles images of equal rank, whose classes would otherwise alternate
            places[i] = ((rank + 0.5) / len(index), hashes[i][::-1])
    return torch.tensor(sorted(places, key=places.__getitem__))


def subset(
    labels: Tensor, fraction: float | None, per_class: int | None, seed: int
) -> Tensor | None:
    """Returns sorted indices of a subset of images with labels (N,) int64; None means all images.

    The subset is `fraction` of each class (rounded, at least one image) or `per_class` images of
    each. A smaller subset lies inside a larger one of the same seed. Raises ValueError if a class
    has too few images.
    """
    if fraction in (None, 1) and per_class is None:
        return None
    # ordered by hashes: no random generator promises the same numbers in every version
    chosen = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten().tolist()
        count = per_class or max(1, round((fraction or 1) * len(index)))
        if count > len(index):
            raise ValueError(
                f"per_class={per_class} is more than the {len(index)} images of label {label} to "
                f"train on; use at most {labels.bincount()[labels.unique()].min()}"
            )
        chosen += sorted(index, key=lambda i: hashing.of_text(f"{seed}/{i}"))[:count]
    return torch.tensor(sorted(chosen))
