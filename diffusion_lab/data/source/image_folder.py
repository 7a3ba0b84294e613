"""A folder of images: one subfolder per class, or the images themselves."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from diffusion_lab.common.formats import some
from diffusion_lab.common.labels import TEXT
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import settings
from diffusion_lab.data.source import listing
from diffusion_lab.data.source.decoding import BadImage, check_bytes
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.labelling import (
    LABELS,
    Listed,
    check_all,
    labelled,
    labels_in_csv,
    labels_of,
)
from diffusion_lab.data.source.listing import ImageFiles
from diffusion_lab.data.source.verified_files import DataError


@settings
class FilesAtPaths(FileSource):
    """Images whose test split, if there is one, is at a separate path.

    A file dataset.json beside the images, or the CSV `label_file`, gives their labels and order.
    Without it there is one folder per class, or there are no labels.
    """

    test_path: str | None = None
    label_file: str | None = None

    @property
    def splits(self) -> tuple[str, str | None]:
        return self.path, self.test_path

    def named(self, path: str) -> str:
        """Returns one of the paths with its argument's name, with which errors begin."""
        return f"{'path' if path == self.path else 'test_path'}={path}"

    def labelled(
        self,
        path: str,
        names: list[str],
        classes: tuple[str, ...] | None,
        read: Callable[[str], bytes | None],
    ) -> tuple[list[str], tuple[str, ...], Listed]:
        """The names of images in order, classes and labels; `read` reads a file beside images."""
        file = self.label_file or LABELS
        content, where = read(file), f"{file} of {path}"
        if content is None:
            if self.label_file or self.label_size:
                raise DataError(
                    f"{self.named(path)} has no {file} with labels; set label_file to a CSV there, "
                    "or write label_file=null label_size=null"
                )
            return names, *listing.by_folder(names, classes, self.named(path))
        text = self.label_size == TEXT
        named = (
            labels_in_csv(content, where, text) if self.label_file else labels_of(content, where)
        )
        if named is None or (classes == () and not self.label_size):
            if classes or self.label_size:
                wanted = f"the classes {some(classes)}" if classes else "label_size"
                raise DataError(f"{where} has no labels for {wanted}; add them")
            return names, (), [0] * len(names)
        check_all(list(named), names, where)
        return list(named), *labelled(named, classes, self.label_size, where)


class ImageFolder(FilesAtPaths):
    """Image files in one folder per class; a label is an index into the sorted folder names.

    Images in no class folder have no labels, unless a dataset.json gives them. Hidden files are
    ignored. Links are followed, but never twice to the same folder.
    """

    def find(self, path: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the images, sorted by name."""
        where = self.named(path)
        root = listing.existing(path, where, "folder", "ImageZip")
        names = listing.images_among(files_under(root), where)
        names, classes, labels = self.labelled(
            path, names, classes, lambda name: content_of(root / name)
        )
        return in_folder(path, root, names, classes, labels)


def in_folder(
    where: str, root: Path, names: list[str], classes: tuple[str, ...], labels: Listed
) -> ImageFiles:
    """The named images under `root`, stamped by their sizes and times."""

    def stamp(name: str) -> object:
        path = root / name
        return None if leads_nowhere(path) else [(s := path.stat()).st_size, s.st_mtime_ns]

    return ImageFiles(where, names, classes, labels, lambda name: opened(root / name), stamp)


def content_of(path: Path) -> bytes | None:
    """The content of a file; None if there is none. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def opened(path: Path) -> BinaryIO:
    """Opens an image; raises BadImage for a broken link, a large file, or none of bytes."""
    if leads_nowhere(path):
        raise BadImage(f"a link to {os.readlink(path)}, which does not exist")
    if not path.is_file():  # a pipe or a device may never end
        raise BadImage("not a regular file")
    check_bytes(path.stat().st_size)
    return path.open("rb")


def files_under(root: Path) -> list[str]:
    """Lists the names of files, with / between folders; links are followed, but to no folder twice.

    Raises DataError for a folder that cannot be read, and for a broken link that may be to a
    folder.
    """
    read: set[tuple[int, int]] = set()  # folders, by device and inode
    found: list[Path] = []
    starts = [root]
    for start in starts:  # links come last, so that a folder inside root keeps its own name
        for at, folders, files in os.walk(start, onerror=_refuse):
            facts, folder = os.stat(at), Path(at)
            identity = (facts.st_dev, facts.st_ino)
            # not within root itself, where some file systems distinguish folders by name only
            if start != root and identity in read:
                say(f"Skipped {folder}: it links to a folder that was already read")
                folders.clear()
                continue
            read.add(identity)
            inside = [folder / name for name in sorted(folders) if not listing.hidden(name)]
            starts += [each for each in inside if each.is_symlink()]
            folders[:] = [each.name for each in inside if not each.is_symlink()]
            found += [folder / name for name in files if not listing.hidden(name)]
    for path in found:
        # otherwise a class could be missing unnoticed
        if leads_nowhere(path) and not path.name.lower().endswith(listing.EXTENSIONS):
            raise DataError(
                f"{path} links to {os.readlink(path)}, which does not exist; fix or remove it"
            )
    return [path.relative_to(root).as_posix() for path in found]


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be read ({error.strerror}); make it readable"
    ) from error


def leads_nowhere(path: Path | str) -> bool:
    """Whether `path` is a broken link, or a link to itself."""
    return os.path.islink(path) and not os.path.exists(path)
