"""Lists of image files: their names, in an order that never changes, and their classes."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from diffusion_lab.common import hashing
from diffusion_lab.common.formats import SHOWN, some
from diffusion_lab.common.labels import LARGEST, LONGEST, TEXT, is_caption, is_number
from diffusion_lab.data.source.acquire import DataError

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm"),
)


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images, not yet read; `labels` are indices into `classes`, or 0 if there are none,
    or vectors, or captions.

    `where` names the images in messages, and `open` opens one by name, in any thread. `stamp`
    gives, by name, a plain value that changes when the image does.
    """

    where: str
    names: list[str]
    classes: tuple[str, ...]
    labels: Sequence[int | list[float] | str]
    open: Callable[[str], IO[bytes]]
    stamp: Callable[[str], object]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Iterable[int]) -> "ImageFiles":
        """Selects the images at these indices, in this order."""
        index = list(index)
        names, labels = [self.names[i] for i in index], [self.labels[i] for i in index]
        return replace(self, names=names, labels=labels)

    def checksum(self) -> str:
        """The checksum of all names and stamps, in order."""
        return hashing.of_text(json.dumps([(name, self.stamp(name)) for name in self.names]))

    def scattered(self) -> "ImageFiles":
        """Returns all images in a fixed order that has nothing to do with their classes."""
        return self.take(sorted(range(len(self)), key=lambda i: hash_share(self.names[i])))

    def divided(self, share: float) -> tuple["ImageFiles", "ImageFiles"]:
        """Splits off about `share` of the images for testing; adding files never moves others."""
        tests = [hash_share(name) < share for name in self.names]
        train = self.take(i for i, test in enumerate(tests) if not test)
        return train, self.take(i for i, test in enumerate(tests) if test)


def hash_share(name: str) -> float:
    """Returns a number from 0 to 1 that depends on the name alone."""
    return int(hashing.of_bytes(os.fsencode(name))[:16], 16) / 2**64


def existing(path: str, where: str, what: str, instead: str) -> Path:
    """Returns the path of an existing `what`, file or folder; DataError suggests `instead`.

    `where` is the path with its argument's name, and begins all errors about it.
    """
    found = Path(path)
    if not found.exists():
        raise DataError(
            f"{where} does not exist; write the path of a {what}, or, if the data of a trained "
            "run were moved, data_root= and their new folder"
        )
    # a pipe or a device is neither; to read it may never end
    if not (found.is_dir() if what == "folder" else found.is_file()):
        raise DataError(f"{where} is not a {what}; give one, or a {instead}")
    return found


def images_among(names: Iterable[str], where: str) -> list[str]:
    """The sorted names of images, with / between folders, unless hidden; DataError without any."""
    visible = [name for name in names if not hidden(name)]
    images = sorted(name for name in visible if name.lower().endswith(EXTENSIONS))
    if not visible:
        raise DataError(f"{where} is empty; set data.source.path to where the images are")
    if not images:
        found = sorted({PurePosixPath(name).suffix or "no extension" for name in visible})
        raise DataError(
            f"{where} has no images, only files with {some(found)}; images must have one of "
            f"{', '.join(EXTENSIONS)}"
        )
    return images


def by_folder(
    names: list[str], classes: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """Returns classes and labels of images in one folder per class; without folders no classes.

    `classes`, if not None, are the required ones in the order of their labels; () ignores folders.
    Raises DataError for any other layout.
    """
    deep = next((name for name in names if name.count("/") > 1), None)
    flat = [name for name in names if "/" not in name]
    if classes == () or (classes is None and len(flat) == len(names)):
        return (), [0] * len(names)
    if flat and len(flat) < len(names):
        raise DataError(
            f"{where} has images ({some(flat)}) next to folders of images; move them into the "
            "folder of their class, or write data.source.classes=[] conditioning=none to use all "
            "images without classes"
        )
    if deep:
        raise DataError(
            f"{where} has folders inside of folders ({deep}); set data.source.path to a folder "
            "with one folder of images per class, or write data.source.classes=[] "
            "conditioning=none to use all images without classes"
        )
    folders = [] if flat else [name.partition("/")[0] for name in names]
    found = sorted(set(folders))
    classes = tuple(found) if classes is None else classes
    lacking = [name for name in classes if name not in found]
    strange = [name for name in found if name not in classes]
    if lacking or strange:
        parts = [f"has no folder {some(lacking)}"] if lacking else []
        parts += [f"has the additional folder {some(strange)}"] if strange else []
        raise DataError(
            f"{where} {' and '.join(parts)}, but the classes are {some(classes)}; use one folder "
            "per class, the same for training and test data, and list all of them in classes"
        )
    labels = {name: label for label, name in enumerate(classes)}
    return classes, [labels[folder] for folder in folders]


def by_number(
    names: Sequence[object], labels: Sequence[Any], classes: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """Returns the classes of numeric labels; if `classes` is None, the numbers are the names.

    Raises DataError for labels that are not numbers or too large, or skip an unnamed class.
    """
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or label < 0:
            raise DataError(
                f"{where} labels {name} with {str(label)[:60]}; a label must be a whole number of "
                "at least 0"
            )
    count = max(labels) + 1
    if classes is not None:
        if count > len(classes):
            raise DataError(
                f"{where} has the label {count - 1}, but there are only {len(classes)} classes, "
                f"{some(classes)}; list all of them in classes"
            )
        return classes
    if unused := count - len(used := set(labels)):
        # labels may be large, as times are
        first = list(islice((number for number in range(count) if number not in used), SHOWN))
        raise DataError(
            f"{where} has labels up to {count - 1} but no image of {some(first, unused)}; number "
            "the classes without gaps, or list all of them in classes"
        )
    return tuple(map(str, range(count)))


def hidden(name: str) -> bool:
    """Whether a file is hidden, or a folder that it is in: by a dot, or as metadata of macOS."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 7], ...]}, or null for none
Listed = Sequence[int | list[float] | str]  # classes, vectors of equal lengths, or captions


def labels_of(content: bytes, where: str) -> dict[str, Any] | None:
    """Each image's label in a dataset.json, in order, or None if it has none; raises DataError."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); fix it") from error
    pairs = found.get("labels") if isinstance(found, dict) else ()
    if pairs is None:
        return None
    form = (
        f'{where} must be {{"labels": [["name.png", 0], ...]}}, or have null in place of the list'
    )
    if not isinstance(pairs, list) or not pairs:
        raise DataError(form)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(f"{form}, but it has {json.dumps(pair)[:60]}")
    return _once(pairs, where)


def labels_in_csv(content: bytes, where: str, as_text: bool) -> dict[str, Any]:
    """The label of each image in a CSV: titles, then names, each with numbers or a caption.

    Labels are captions if none is a number, or if they are to be taken `as_text`; raises DataError.
    """
    try:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a readable CSV ({error}); fix it") from error
    titles, *rows = [line for line in lines if line] or [[]]
    if len(titles) < 2 or not rows:
        raise DataError(
            f"{where} must have a line of titles, and for each image its name and its numbers, or "
            "its caption"
        )
    pairs: list[tuple[str, Any]] = []
    texts = len(titles) == 2 and (as_text or not any(map(_numbers_in, rows)))
    for row in rows:
        if len(row) != len(titles) or not (texts or _numbers_in(row)):
            raise DataError(
                f"{where} has the line {','.join(row)[:60]}; it must have a name and "
                f"{len(titles) - 1} numbers, as many as there are titles, or, like all others, a "
                "caption"
            )
        pairs.append((row[0], row[1] if texts else _numbers_in(row)))
    return _once(pairs, where)


def labelled(
    named: dict[str, Any], classes: tuple[str, ...] | None, size: int | str | None, where: str
) -> tuple[tuple[str, ...], Listed]:
    """The classes and the labels of images by their names; only classes have classes.

    `size` is the length of vectors, 0 for classes, TEXT for captions; None infers it, unless
    `classes` are given. Raises DataError.
    """
    given = list(named.values())
    if size is None:
        size = 0 if classes is not None else _size_of(given)
    if size == 0:
        return by_number(list(named), given, classes, where), given
    if size == TEXT:
        for name, label in named.items():
            if not isinstance(label, str) or not is_caption(label):
                raise DataError(
                    f"{where} labels {name} with {str(label)[:60]!r}; a caption must have 1 to "
                    f"{LONGEST} bytes"
                )
        return (), given
    vectors = [label if isinstance(label, list) else [label] for label in given]
    for name, vector in zip(named, vectors, strict=True):
        if not all(map(is_number, vector)) or len(vector) != size:
            raise DataError(
                f"{where} labels {name} with {str(named[name])[:60]}; a label must be "
                f"{'a number' if size == 1 else f'{size} numbers'} of at most {LARGEST:.4g}, like "
                "the others"
            )
    return (), [[float(v) for v in vector] for vector in vectors]


def _numbers_in(row: Sequence[str]) -> list[float]:
    """The numbers after the name in a row of a CSV; none if one of them is no number."""
    try:
        return [float(cell) for cell in row[1:]]
    except ValueError:
        return []


def _size_of(labels: Sequence[Any]) -> int | str:
    """The length of vectors; TEXT if all are texts, 0 if all are whole numbers or anything else."""
    if all(isinstance(label, str) for label in labels):
        return TEXT
    first = next((label for label in labels if isinstance(label, float | list)), 0)
    return len(first) if isinstance(first, list) else int(isinstance(first, float))


def _once(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{where} labels {some(twice)} more than once; keep one label for each")
    return dict(pairs)
