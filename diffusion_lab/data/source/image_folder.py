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
        root = existing(path, "folder", "image_zip")
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
    files, folders, links, read, linked = [], [""], [], set(), False
    while folders or links:
        # links wait, so that a folder inside of root is known by its own name
        linked = linked or not folders
        folder = folders.pop() if folders else links.pop(0)
        path = root / folder
        try:
            facts = os.stat(path)
            identity = (facts.st_dev, facts.st_ino)
            # not before the first link: some file systems tell folders apart by name alone
            if linked and identity in read:
                say(f"Skipped {path}: it links to a folder that is read already")
                continue
            read.add(identity)
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read ({error.strerror}); change that"
            ) from error
        for entry in entries:
            if hidden(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif not entry.is_symlink():
                files.append(name)
            elif os.path.isdir(entry.path):
                links.append(name)
            elif leads_nowhere(entry.path) and not name.lower().endswith(EXTENSIONS):
                # a class would be missing, and nobody would know
                raise DataError(
                    f"{entry.path} links to {os.readlink(entry.path)}, which is not there; mend or "
                    "remove it"
                )
            else:
                files.append(name)
    return files


def leads_nowhere(path: Path | str) -> bool:
    """Whether it is a link to nothing, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)
