"""A folder of images: one subfolder per class, or the images themselves."""

import os
from pathlib import Path
from typing import BinaryIO

from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import settings
from diffusion_lab.data.source import listing
from diffusion_lab.data.source.decoding import BadImage
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.listing import ImageFiles
from diffusion_lab.data.source.verified_files import DataError


@settings
class FilesAtPaths(FileSource):
    """Images whose test split, if there is one, is at a separate path."""

    test_path: str | None = None

    @property
    def splits(self) -> tuple[str, str | None]:
        return self.path, self.test_path

    def named(self, path: str) -> str:
        """Returns one of the paths with its argument's name, with which errors begin."""
        return f"{'path' if path == self.path else 'test_path'}={path}"


class ImageFolder(FilesAtPaths):
    """Image files in one folder per class; a label is an index into the sorted folder names.

    Images in no class folder have no labels. Hidden files are ignored. Links are followed, but
    never twice to the same folder.
    """

    def find(self, path: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the images, sorted by name."""
        where = self.named(path)
        root = listing.existing(path, where, "folder", "ImageZip")
        names = listing.images_among(files_under(root), where)
        classes, labels = listing.by_folder(names, classes, where)
        return in_folder(path, root, names, classes, labels)


def in_folder(
    where: str, root: Path, names: list[str], classes: tuple[str, ...], labels: list[int]
) -> ImageFiles:
    """The named images under `root`, stamped by their sizes and times."""

    def stamp(name: str) -> object:
        path = root / name
        return None if leads_nowhere(path) else [(s := path.stat()).st_size, s.st_mtime_ns]

    return ImageFiles(where, names, classes, labels, lambda name: opened(root / name), stamp)


def opened(path: Path) -> BinaryIO:
    """Opens a file; raises BadImage for a broken link."""
    if leads_nowhere(path):
        raise BadImage(f"a link to {os.readlink(path)}, which does not exist")
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
