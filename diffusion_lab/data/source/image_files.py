"""Images in files of the user's own: what is inferred of them, how they are read and held out."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from diffusion_lab.common.progress import say
from diffusion_lab.common.ranges import Range, inside, one_of, ranges, whole, whole_list
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.source.decoding import RESIZE, check_memory, decode, infer
from diffusion_lab.data.source.listing import ImageFiles, some
from diffusion_lab.data.source.verified_files import DataError


def _is_size(value: Any) -> bool:
    """Whether it is None, a number of pixels, or a height and a width."""
    return (
        value is None
        or whole(1).allows(value)
        or (whole_list(1, shortest=2).allows(value) and len(value) == 2)
    )


def _are_names(value: Any) -> bool:
    """Whether it is None or a list of different names; a folder 2024 is a number to Hydra."""
    if value is None:
        return True
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    named = listed and all(isinstance(name, str) or whole(0).allows(name) for name in value)
    return named and len(set(map(str, value))) == len(value)


class FileSource(DataSource):
    """Images that are decoded into memory once; size, channels and classes may be inferred.

    What is inferred is asked of names and headers, when it is asked for; nothing is read where all
    three are given, as a run's own configuration gives them. Without a test split, `test_share` of
    the images is held out. There are no labels where `classes` is empty.
    """

    sizes_vary = True

    @ranges(
        test_share=inside(0, 1).as_in(0.1),
        image_size=Range("a number of pixels, [height,width] or null", _is_size, 64),
        channels=Range(
            "1, 3 or null", lambda value: value is None or (type(value) is int and value in (1, 3))
        ),
        classes=Range("a list of different names, or null", _are_names, ["cat", "dog"]),
        resize=one_of(*RESIZE),
        on_bad=one_of("refuse", "skip"),
    )
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
        self.path, self.test_path = path, test_path
        self.test_share = test_share
        square = [image_size] * 2 if isinstance(image_size, int) else image_size
        self.image_size = None if square is None else (square[0], square[1])
        self.channels = channels
        self.classes = None if classes is None else tuple(map(str, classes))
        self.resize = "refuse" if image_size is None else resize
        self.on_bad = on_bad

    @abstractmethod
    def find(self, train: bool, classes: tuple[str, ...] | None) -> ImageFiles | None:
        """The files of a split, None if there is no test split; raises DataError.

        `classes` are those that the labels count; None leaves them to be found.
        """

    @cached_property
    def native_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(C, H, W), by headers if it is not configured."""
        size, channels = self.image_size, self.channels
        if size is None or channels is None:
            found_size, found_channels = infer(self._files[0])
            size = found_size if size is None else size
            channels = found_channels if channels is None else channels
        return (channels, *size)

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
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
        assert train is not None, "there is a training split always"
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
