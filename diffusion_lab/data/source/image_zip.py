"""A zip of images, with the labels of its dataset.json: the layout of StyleGAN's and EDM's data."""

import re
import zipfile
from pathlib import Path
from typing import IO

from diffusion_lab.data.source import listing
from diffusion_lab.data.source.decoding import check_bytes
from diffusion_lab.data.source.image_folder import FilesAtPaths
from diffusion_lab.data.source.labelling import LABELS, Listed
from diffusion_lab.data.source.listing import ImageFiles
from diffusion_lab.data.source.verified_files import DataError

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
