"""A folder of images: one folder a class inside of it, or the images themselves."""

import os
from pathlib import Path

from diffusion_lab.data.image_files import ImageFilesDataModule
from diffusion_lab.data.listing import ImageFiles, by_folder, existing, images_among
from diffusion_lab.data.verified_files import DataError


class ImageFolderDataModule(ImageFilesDataModule):
    """Image files; a class is a folder, its label the place of its name among the sorted ones.

    Images that lie in no folder have no labels. Hidden files do not count.
    """

    def find(self, train: bool, classes: tuple[str, ...] | None) -> ImageFiles | None:
        """The images sorted by name."""
        path = self.path if train else self.test_path
        if path is None:
            return None
        root = existing(path, "folder", "image_zip")
        names = images_among(files_under(root), path)
        classes, labels = by_folder(names, classes, path)
        return ImageFiles(path, names, classes, labels, lambda name: (root / name).open("rb"))


def files_under(root: Path) -> list[str]:
    """The names of all files, with / between folders; links are followed. Raises DataError."""
    prefix = len(str(root)) + 1

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); change that"
        ) from error

    return [
        os.path.join(folder, name)[prefix:]
        for folder, _, names in os.walk(str(root), onerror=unreadable, followlinks=True)
        for name in names
    ]
