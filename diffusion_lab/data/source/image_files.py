"""The user's own image files: what is inferred from them, and how they are read and split."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import torch

from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import (
    Range,
    inside,
    one_of,
    optional,
    settings,
    whole,
    whole_list,
)
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.source.decoding import RESIZE, check_memory, decode, infer
from diffusion_lab.data.source.listing import ImageFiles, some
from diffusion_lab.data.source.verified_files import DataError


def _are_names(value: Any) -> bool:
    """Whether `value` is None or a list of different names; a folder 2024 is a number to Hydra."""
    if value is None:
        return True
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    named = listed and all(isinstance(name, str) or whole(0).allows(name) for name in value)
    return named and len(set(map(str, value))) == len(value)


SIZE = Range(
    "a number of pixels, [height,width] or null",
    lambda value: (
        optional(whole(1)).allows(value)
        or (whole_list(1, shortest=2).allows(value) and len(value) == 2)
    ),
    64,
)
CHANNELS = Range("1, 3 or null", lambda v: v is None or (type(v) is int and v in (1, 3)))
CLASSES = Range("a list of different names, or null", _are_names, ["cat", "dog"])


@settings
class FileSource(DataSource):
    """Images that are decoded into memory once; size, channels and classes may be inferred.

    Names and headers are read only when an inferred value is needed, so not at all if all three are
    given, as in a run's saved configuration. Without a test split, `test_share` of the images is
    taken as one. Images have no labels if `classes` is empty.
    """

    path: str
    test_share: Annotated[float, inside(0, 1).as_in(0.1)] = 0.1
    image_size: Annotated[int | Sequence[int] | None, SIZE] = None
    channels: Annotated[int | None, CHANNELS] = None
    classes: Annotated[Sequence[str] | None, CLASSES] = None
    resize: Annotated[str, one_of(*RESIZE)] = "crop"
    on_bad: Annotated[str, one_of("refuse", "skip")] = "refuse"

    def __post_init__(self) -> None:
        if self.image_size is None:
            self.resize = "refuse"
        self._classes = None if self.classes is None else tuple(map(str, self.classes))

    @property
    @abstractmethod
    def splits(self) -> tuple[str, str | None]:
        """The arguments of `find` for the training and the test split; None for no test split."""

    @abstractmethod
    def find(self, split: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Finds the files of a split; raises DataError.

        `classes` are the names that labels index; None infers them.
        """

    @cached_property
    def native_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """The (C, H, W) of the images, as configured or inferred from headers."""
        size, channels = self.image_size, self.channels
        if size is None or channels is None:
            found = infer(self._files[0])
            size, channels = size or found[0], channels or found[1]
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The class names of the training split; empty for images without labels."""
        return self._files[0].classes if self._classes is None else self._classes

    def facts(self) -> dict[str, object]:
        """Settings that a run saves: what was inferred, and `resize`, refuse if the size was."""
        channels, *size = self.native_shape
        return {
            "image_size": size,
            "channels": channels,
            "classes": list(self.class_names),
            "resize": self.resize,
        }

    def prepare(self) -> None:
        """Finds the files; raises DataError."""
        _ = self._files

    def load(self) -> tuple[Split, Split]:
        """Decodes all images; raises DataError if memory is too small for them."""
        train, test = self._files
        check_memory(len(train) + len(test), self.native_shape)
        return self._decoded(train), self._decoded(test)

    @cached_property
    def _files(self) -> tuple[ImageFiles, ImageFiles]:
        first, second = self.splits
        train, remedy = self.find(first, self._classes), "add images"
        if second is None:
            train, test = train.divided(self.test_share)
            remedy += f", or change test_share={self.test_share}"
        else:
            test = self.find(second, train.classes)
        for files, split in ((train, "training"), (test, "testing")):
            _check_count(len(files), f"of {files.where} for {split}", remedy)
        # shuffled, so that the first test images, which many metrics use, include every class
        return train, test.scattered()

    def _decoded(self, files: ImageFiles) -> Split:
        images, bad = decode(files, self.native_shape, self.resize)
        labels = torch.tensor(files.labels)
        if not bad:
            return Split(images, labels)
        named = some([f"{files.names[index]} ({reason})" for index, reason in bad.items()])
        which = f"{len(bad):,} of {len(files):,} images of {files.where}"
        if self.on_bad == "refuse":
            raise DataError(
                f"{which} cannot be used: {named}; fix or remove them, or write on_bad=skip"
            )
        _check_count(len(files) - len(bad), f"of {files.where} can be used", f"fix {named}")
        say(f"Skipped {which}: {named}")
        good = torch.tensor([index for index in range(len(files)) if index not in bad])
        return Split(images[good], labels[good])


def _check_count(count: int, which: str, remedy: str) -> None:
    if count < 2:  # metrics need a variance
        raise DataError(f"{count} images {which} are too few, a split needs 2 or more; {remedy}")
