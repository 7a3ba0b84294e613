"""A folder of images: one folder a class inside of it, or the images themselves."""

import os
from pathlib import Path
from typing import BinaryIO

from diffusion_lab.common.progress import say
from diffusion_lab.data.source.decoding import BadImage
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.listing import (
    EXTENSIONS,
    ImageFiles,
    by_folder,
    existing,
    hidden,
    images_among,
)
from diffusion_lab.data.source.verified_files import DataError


class ImageFolder(FileSource):
    """Image files; a class is a folder, its label the place of its name among the sorted ones.

    Images that lie in no folder have no labels. Hidden files do not count. Links are followed, but
    to no folder twice.
    """

    def find(self, train: bool, classes: tuple[str, ...] | None) -> ImageFiles | None:
        """The images sorted by name."""
        path = self.path if train else self.test_path
        if path is None:
            return None
        root = existing(path, "folder", "ImageZip")
        names = images_among(files_under(root), path)
        classes, labels = by_folder(names, classes, path)
        return ImageFiles(path, names, classes, labels, lambda name: opened(root / name))


def opened(path: Path) -> BinaryIO:
    """The file; raises BadImage where a link leads nowhere."""
    if leads_nowhere(path):
        raise BadImage(f"a link to {os.readlink(path)}, which is not there")
    return path.open("rb")


def files_under(root: Path) -> list[str]:
    """The names of files, with / between folders; links are followed, but to no folder twice.

    Raises DataError for a folder that cannot be read, and for a link that may be one to a folder.
    """
    read: set[tuple[int, int]] = set()  # which folders, by device and inode
    # links wait, so that a folder inside of root is known by its own name
    found: dict[str, list[str]] = {"files": [], "folders": [], "links": [""]}
    while found["links"]:
        found["folders"].append(found["links"].pop(0))
        linked = bool(read)  # in root itself some file systems tell folders apart by name alone
        while found["folders"]:
            folder = found["folders"].pop()
            identity, entries = _contents(root / folder)
            if linked and identity in read:
                say(f"Skipped {root / folder}: it links to a folder that is read already")
                continue
            read.add(identity)
            for entry in entries:
                found[_kind(entry)].append(f"{folder}/{entry.name}" if folder else entry.name)
    return found["files"]


def _contents(folder: Path) -> tuple[tuple[int, int], list[os.DirEntry]]:
    """The identity of a folder, and what is in it but hidden things, by name; raises DataError."""
    try:
        facts = os.stat(folder)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); change that"
        ) from error
    return (facts.st_dev, facts.st_ino), [entry for entry in entries if not hidden(entry.name)]


def _kind(entry: os.DirEntry) -> str:
    """Whether an entry counts among files, folders or links to folders; raises DataError."""
    if entry.is_dir(follow_symlinks=False):
        return "folders"
    if entry.is_symlink() and os.path.isdir(entry.path):
        return "links"
    if leads_nowhere(entry.path) and not entry.name.lower().endswith(EXTENSIONS):
        # a class would be missing, and nobody would know
        raise DataError(
            f"{entry.path} links to {os.readlink(entry.path)}, which is not there; mend or "
            "remove it"
        )
    return "files"


def leads_nowhere(path: Path | str) -> bool:
    """Whether it is a link to nothing, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)
