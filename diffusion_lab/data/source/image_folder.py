"""A folder of images: one subfolder per class, or the images themselves."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from diffusion_lab.common.formats import some
from diffusion_lab.common.labels import TEXT
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import settings
from diffusion_lab.data.source import listing
from diffusion_lab.data.source.decoding import BadImage, check_bytes
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.listing import (
    LABELS,
    ImageFiles,
    Listed,
    check_all,
    labelled,
    labels_in_csv,
    labels_of,
)
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


LARGEST_LABELS = 2**30  # bytes of a dataset.json: labels of 20 million images


class ImageZip(FilesAtPaths):
    """Images in a zip, which is never unpacked.

    A dataset.json at the top of the zip gives the labels and the order of the images, whatever
    their folders. Without it the zip is read like a folder: one folder per class, or no classes.
    """

    def find(self, path: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the images in the order of their labels' file, or sorted by name."""
        named = self.named(path)
        archive, names = opened_zip(listing.existing(path, named, "file", "ImageFolder"), named)
        names, classes, labels = self.labelled(
            path, names, classes, lambda name: member_of(archive, name, path)
        )
        return in_zip(path, archive, names, classes, labels)


def member_of(archive: zipfile.ZipFile, name: str, path: str) -> bytes | None:
    """The content of a member of the zip at `path`; None if there is none. Raises DataError."""
    if name not in archive.namelist():
        return None
    if (size := archive.getinfo(name).file_size) > LARGEST_LABELS:
        raise DataError(
            f"{name} of {path} has {size:,} bytes, which are more than "
            f"{LARGEST_LABELS:,}; create the zip again"
        )
    try:
        return archive.read(name)
    except Exception as error:  # a damaged file may give any: of zlib, of memory, ...
        raise DataError(
            f"{name} of {path} cannot be read ({error}); create the zip again"
        ) from error


def in_zip(
    where: str,
    archive: zipfile.ZipFile,
    names: list[str],
    classes: tuple[str, ...],
    labels: Listed,
) -> ImageFiles:
    """The named images in a zip, stamped by the checksums that it keeps."""

    def opened(name: str) -> IO[bytes]:
        check_bytes(archive.getinfo(name).file_size)  # of which more are never read
        return archive.open(name)

    return ImageFiles(where, names, classes, labels, opened, lambda name: archive.getinfo(name).CRC)


def opened_zip(file: Path, named: str) -> tuple[zipfile.ZipFile, list[str]]:
    """Opens a zip, which several threads can read; also returns the sorted names of its images.

    `named` is the path with its argument's name, with which the errors begin (DataError).
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{named} is not a readable zip ({error}); create it again") from error
    # appending may leave two members of one name, of which a zip reads the last
    members = list(dict.fromkeys(i.filename for i in archive.infolist() if not i.is_dir()))
    for name in members:
        first, *rest = re.split(r"[/\\]", name)
        if first == "" or ".." in (first, *rest):
            raise DataError(
                f"{named} has a member outside of the archive ({name}); create it again"
            )
    return archive, listing.images_among((name for name in members if name != LABELS), named)
