"""The user's own image files: what is inferred from them, and how they are read and split."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch

from diffusion_lab.common.formats import some
from diffusion_lab.common.labels import TEXT
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import (
    AUTO,
    PATH,
    Range,
    inside,
    one_of,
    optional,
    settings,
    whole,
    whole_list,
)
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.base import LABEL_SIZE, DataSource, Split
from diffusion_lab.data.source.decoding import RESIZE, check_memory, decode_into, infer
from diffusion_lab.data.source.listing import ImageFiles
from diffusion_lab.data.store import Allocate, StoredValues, in_memory, stored

LARGE = 10**9  # bytes of both splits, from which on store=auto keeps images in files


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
    """Images that are decoded once; size, channels and classes may be inferred.

    Names and headers are read only when an inferred value is needed, so not at all if all three are
    given, as in a run's saved configuration. Without a test split, `test_share` of the images is
    taken as one. Images have no labels if `classes` is empty, or vectors of `label_size` numbers,
    or captions if that is `text`.

    Decoded images are kept in memory, or with `store` in files in `store_dir` that are mapped into
    memory; "auto" does so for more than 1 GB.
    """

    path: str
    test_share: Annotated[float, inside(0, 1).as_in(0.1)] = 0.1
    image_size: Annotated[int | Sequence[int] | None, SIZE] = None
    channels: Annotated[int | None, CHANNELS] = None
    classes: Annotated[Sequence[str] | None, CLASSES] = None
    label_size: Annotated[int | str | None, LABEL_SIZE] = None
    resize: Annotated[str, one_of(*RESIZE)] = "crop"
    on_bad: Annotated[str, one_of("refuse", "skip")] = "refuse"
    store: Annotated[bool | str, AUTO] = "auto"
    store_dir: Annotated[str, PATH] = "data/decoded"

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
        """Finds a split's files; labels index `classes`, None infers them. Raises DataError."""

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

    @property
    def values_per_label(self) -> int | str:  # type: ignore[override]
        """The length of labels that are numbers, or text; 0 for classes, or no labels."""
        if self.label_size is None and self._classes is None:
            _ = self._files
        return self.label_size or 0

    def facts(self) -> dict[str, object]:
        """Settings that a run saves: what was inferred, and `resize`, refuse if the size was."""
        channels, *size = self.native_shape
        return {
            "image_size": size,
            "channels": channels,
            "classes": list(self.class_names),
            "label_size": self.values_per_label,
            "resize": self.resize,
        }

    def prepare(self) -> None:
        """Finds the files, and decodes them if they are to be stored; raises DataError."""
        if self.stores:
            self.load()

    def load(self) -> tuple[Split, Split]:
        """Decodes all images, or opens the files that hold them; raises DataError."""
        train, test = self._files
        if not self.stores:
            check_memory(len(train) + len(test), self.native_shape)
        return self._decoded(train), self._decoded(test)

    @property
    def stores(self) -> bool:
        """Whether decoded images are kept in files."""
        count = sum(map(len, self._files))
        large = count * math.prod(self.native_shape) > LARGE
        return large if self.store == "auto" else bool(self.store)

    @cached_property
    def _files(self) -> tuple[ImageFiles, ImageFiles]:
        first, second = self.splits
        train, remedy = self.find(first, self._classes), "add images"
        label = train.labels[0] if len(train) else 0
        if isinstance(label, list | str):
            self.label_size = len(label) if isinstance(label, list) else TEXT  # of tests, too
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
        images, facts = self._stored(files) if self.stores else self._computed(files, in_memory)
        if bad := dict(facts["bad"]):
            say(f"Skipped {_counted(files, bad)}: {_named(files, bad)}")
        labels = [label for index, label in enumerate(files.labels) if index not in bad]
        return Split(images, self.labels.tensor(labels))

    def _stored(self, files: ImageFiles) -> StoredValues:
        """Opens the file that holds the decoded images, or decodes them into it."""
        key = {
            "files": files.checksum(),
            "shape": list(self.native_shape),
            "resize": self.resize,
            "on_bad": self.on_bad,
        }
        name = f"{Path(files.where).stem}-{'x'.join(map(str, self.native_shape))}"
        try:
            return stored(self.store_dir, name, key, partial(self._computed, files))
        except OSError as error:
            size = len(files) * math.prod(self.native_shape)
            raise DataError(
                f"store_dir={self.store_dir} cannot take the {size:,} bytes of "
                f"{files.where} ({error}); choose another folder, or write store=false to keep "
                "the images in memory"
            ) from error

    def _computed(self, files: ImageFiles, allocate: Allocate) -> StoredValues:
        """Decodes to uint8 (N, C, H, W) without the bad images; raises DataError."""
        images = allocate((len(files), *self.native_shape), torch.uint8)
        array = images.numpy()
        bad = decode_into(array, files, self.resize)
        if bad and self.on_bad == "refuse":
            raise DataError(
                f"{_counted(files, bad)} cannot be used: {_named(files, bad)}; fix or remove them, "
                "or write data.source.on_bad=skip"
            )
        good = [index for index in range(len(files)) if index not in bad]
        if bad:
            _check_count(len(good), f"of {files.where} can be used", f"fix {_named(files, bad)}")
            for place, index in enumerate(good):  # one by one: a copy may not fit into memory
                array[place] = array[index]
        return StoredValues(images[: len(good)], {"bad": list(bad.items())})


def _counted(files: ImageFiles, bad: Mapping[int, str]) -> str:
    return f"{len(bad):,} of {len(files):,} images read from {files.where}"


def _named(files: ImageFiles, bad: Mapping[int, str]) -> str:
    return some([f"{files.names[index]} ({reason})" for index, reason in bad.items()])


def _check_count(count: int, which: str, remedy: str) -> None:
    if count < 2:  # metrics need a variance
        raise DataError(f"{count} images {which} are too few, a split needs 2 or more; {remedy}")
