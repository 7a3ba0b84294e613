"""Images in a folder or in a zip: one folder per class, or the images themselves."""

import errno
import os
import re
import zipfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from diffusion_lab.common.formats import some
from diffusion_lab.common.labels import TEXT
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import settings
from diffusion_lab.data.source import listing
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.decoding import BadImage, check_bytes
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.listing import LABELS, ImageFiles, Listed

LARGEST_LABELS = 2**30  # bytes of a dataset.json: labels of 20 million images


class Place(NamedTuple):
    """The files at a path.

    `open` and `stamp` are those of ImageFiles. `read` gives the content of a file beside the
    images, None if there is none; it raises DataError if the file cannot be read.
    """

    names: list[str]  # of the images, sorted
    open: Callable[[str], IO[bytes]]
    stamp: Callable[[str], object]
    read: Callable[[str], bytes | None]


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

    @abstractmethod
    def files_at(self, path: str, where: str) -> Place:
        """Finds the files at a path; `where` is its argument with it, and begins all errors."""

    def find(self, path: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the images in the order of their labels' file, or sorted by name."""
        where = f"{'path' if path == self.path else 'test_path'}={path}"
        place = self.files_at(path, where)
        file = self.label_file or LABELS
        content = place.read(file)
        if content is not None:
            names, classes, labels = self.by_file(content, f"{file} of {path}", place, classes)
        elif self.label_file or self.label_size:
            raise DataError(
                f"{where} has no {file} with labels; set data.source.label_file to a "
                "CSV there, or write data.source.label_file=null data.source.label_size=null"
            )
        else:
            names = place.names
            classes, labels = listing.by_folder(names, classes, where)
        return ImageFiles(path, names, classes, labels, place.open, place.stamp)

    def by_file(
        self, content: bytes, where: str, place: Place, classes: tuple[str, ...] | None
    ) -> tuple[list[str], tuple[str, ...], Listed]:
        """The names of images in order, classes and labels, from the file of this content."""
        if not self.label_file:
            named = listing.labels_of(content, where)
        else:
            named = listing.labels_in_csv(content, where, self.label_size == TEXT)
        if named is None or (classes == () and not self.label_size):
            if classes or self.label_size:
                wanted = f"the classes {some(classes)}" if classes else "label_size"
                raise DataError(f"{where} has no labels for {wanted}; add them")
            return place.names, (), [0] * len(place.names)
        if absent := sorted(set(named) - set(place.names)):
            raise DataError(f"{where} has labels for missing images, {some(absent)}; remove them")
        if lacking := sorted(set(place.names) - set(named)):
            raise DataError(f"{where} has no label for {some(lacking)}; label all images or none")
        return list(named), *listing.labelled(named, classes, self.label_size, where)


class ImageFolder(FilesAtPaths):
    """Image files in one folder per class; a label is an index into the sorted folder names.

    Images in no class folder have no labels, unless a dataset.json gives them. Hidden files are
    ignored. Links are followed, but never twice to the same folder.
    """

    def files_at(self, path: str, where: str) -> Place:
        return in_folder(listing.existing(path, where, "folder", "zip with data=image_zip"), where)


def in_folder(root: Path, where: str) -> Place:
    """The images below a folder, stamped by their sizes and times."""

    def opened(name: str) -> IO[bytes]:
        file = root / name
        if leads_nowhere(file):
            raise BadImage(f"a link to {os.readlink(file)}, which does not exist")
        if not file.is_file():  # a pipe or a device may never end
            raise BadImage("not a regular file")
        check_bytes(file.stat().st_size)
        return file.open("rb")

    def stamp(name: str) -> object:
        file = root / name
        return None if leads_nowhere(file) else [(s := file.stat()).st_size, s.st_mtime_ns]

    def read(name: str) -> bytes | None:
        file = root / name
        try:
            return file.read_bytes() if file.is_file() else None
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}); make it readable"
            ) from error

    return Place(listing.images_among(files_under(root), where), opened, stamp, read)


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
    if not os.path.islink(path):
        return False
    try:
        os.stat(path)
    except OSError as error:  # others are of the disk, whose link may be whole
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return False


class ImageZip(FilesAtPaths):
    """Images in a zip, which is never unpacked.

    A dataset.json at the top of the zip gives the labels and the order of the images, whatever
    their folders. Without it the zip is read like a folder: one folder per class, or no classes.
    """

    def files_at(self, path: str, where: str) -> Place:
        return in_zip(
            listing.existing(path, where, "file", "folder with data=image_folder"), path, where
        )


def in_zip(file: Path, path: str, where: str) -> Place:
    """The images in a zip at `path`, which several threads can read, stamped by its checksums."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{where} is not a readable zip ({error}); create it again") from error
    # appending may leave two members of one name, of which a zip reads the last
    members = list(dict.fromkeys(i.filename for i in archive.infolist() if not i.is_dir()))
    for name in members:
        first, *rest = re.split(r"[/\\]", name)
        if first == "" or ".." in (first, *rest):
            raise DataError(
                f"{where} has a member outside of the archive ({name}); create it again"
            )
        if "\\" in name:
            raise DataError(
                f"{where} has a backslash between folders ({name}), where a zip has a slash; "
                "create it again"
            )

    def opened(name: str) -> IO[bytes]:
        check_bytes(archive.getinfo(name).file_size)  # of which more are never read
        return archive.open(name)

    def read(name: str) -> bytes | None:
        if name not in members:
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

    names = listing.images_among((name for name in members if name != LABELS), where)
    return Place(names, opened, lambda name: archive.getinfo(name).CRC, read)
