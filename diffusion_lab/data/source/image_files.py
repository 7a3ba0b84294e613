"""Images in files of the user's own: what is inferred of them, how they are read and held out."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch

from diffusion_lab.common.errors import is_number, is_whole, require
from diffusion_lab.common.progress import say
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.source.decoding import RESIZE, check_memory, decode, infer
from diffusion_lab.data.source.listing import ImageFiles, some
from diffusion_lab.data.source.verified_files import DataError

ON_BAD = ("refuse", "skip")


class FileSource(DataSource):
    """Images that are decoded into memory once; size, channels and classes may be inferred.

    What is inferred is asked of names and headers, when it is asked for; nothing is read where all
    three are given, as a run's own configuration gives them. Without a test split, `test_share` of
    the images is held out. There are no labels where `classes` is empty.
    """

    sizes_vary = True

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        test_share: float = 0.1,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
        resize: str = "crop",
        on_bad: str = "refuse",
    ):
        require(
            is_number(test_share) and 0 < test_share < 1,
            "test_share",
            test_share,
            "a number above 0 and below 1",
            0.1,
        )
        require(
            channels is None or (is_whole(channels, 1) and channels in (1, 3)),
            "channels",
            channels,
            "1, 3 or null",
        )
        for key, value, known in (("resize", resize, RESIZE), ("on_bad", on_bad, ON_BAD)):
            if value not in known:
                raise ValueError(f"{key}={value} is unknown; use one of {', '.join(known)}")
        self.path = str(path)  # a folder 2024 is a number to Hydra
        self.test_path = None if test_path is None else str(test_path)
        self.test_share = test_share
        self.image_size = None if image_size is None else _size(image_size)
        self.channels = channels
        self.classes = None if classes is None else _class_names(classes)
        self.resize = "refuse" if image_size is None else resize
        self.on_bad = on_bad

    @abstractmethod
    def find(self, train: bool, classes: tuple[str, ...] | None) -> ImageFiles | None:
        """The files of a split, None if there is no test split; raises DataError.

        `classes` are those that the labels count; None leaves them to be found.
        """

    @cached_property
    def native_shape(self) -> tuple[int, int, int]:
        """(C, H, W), by headers if it is not configured."""
        size, channels = self.image_size, self.channels
        if size is None or channels is None:
            found_size, found_channels = infer(self._files[0])
            size = found_size if size is None else size
            channels = found_channels if channels is None else channels
        return (channels, *size)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Of the training split; none at all for images without labels."""
        return self._files[0].classes if self.classes is None else self.classes

    def facts(self) -> dict[str, object]:
        """What was inferred, and that no image is resized if the size was."""
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
        """Decodes all images, if there is room for them."""
        train, test = self._files
        check_memory(len(train) + len(test), self.native_shape)
        return self._decoded(train), self._decoded(test)

    @cached_property
    def _files(self) -> tuple[ImageFiles, ImageFiles]:
        train = self.find(True, self.classes)
        test = self.find(False, train.classes)
        remedy = "add images"
        if test is None:
            train, test = train.divided(self.test_share)
            remedy += f", or change test_share={self.test_share}"
        for files, split in ((train, "training"), (test, "testing")):
            _check_count(len(files), f"of {files.where} for {split}", remedy)
        # the first test images, which much is measured on, are then of every class
        return train, test.scattered()

    def _decoded(self, files: ImageFiles) -> Split:
        images, bad = decode(files, self.native_shape, self.resize)
        labels = torch.tensor(files.labels)
        if not bad:
            return Split(images, labels)
        named = some([f"{files.names[index]} ({reason})" for index, reason in bad.items()])
        told = f"{len(bad):,} of {len(files):,} images of {files.where}"
        if self.on_bad == "refuse":
            raise DataError(
                f"{told} cannot be used: {named}; mend or remove them, or write on_bad=skip"
            )
        _check_count(len(files) - len(bad), f"of {files.where} can be used", f"mend {named}")
        say(f"Skipped {told}: {named}")
        good = torch.tensor([index for index in range(len(files)) if index not in bad])
        return Split(images[good], labels[good])


def _check_count(count: int, told: str, remedy: str) -> None:
    if count < 2:  # metrics want a variance
        raise DataError(f"{count} images {told} are too few, a split needs 2 or more; {remedy}")


def _size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width); raises UserError for what is no size."""
    sides = list(image_size) if isinstance(image_size, Sequence) else [image_size] * 2
    require(
        len(sides) == 2 and all(is_whole(side, 1) for side in sides),
        "image_size",
        image_size,
        "a number of pixels, [height,width] or null",
        64,
    )
    return tuple(sides)


def _class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names as texts; raises UserError for what is none, or comes twice."""
    listed = isinstance(classes, Sequence) and not isinstance(classes, str)
    # a folder 2024 is a number to Hydra
    named = listed and all(isinstance(name, str) or is_whole(name, 0) for name in classes)
    names = tuple(map(str, classes)) if named else ()
    require(
        named and len(set(names)) == len(names),
        "classes",
        classes,
        "a list of different names, or null",
        "[cat,dog]",
    )
    return names
