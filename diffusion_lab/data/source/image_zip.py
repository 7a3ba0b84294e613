"""A zip of images, with the labels of its dataset.json: the layout of StyleGAN's and EDM's data."""

import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from diffusion_lab.data.source import listing
from diffusion_lab.data.source.image_folder import FilesAtPaths
from diffusion_lab.data.source.listing import ImageFiles, some
from diffusion_lab.data.source.verified_files import DataError

LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 7], ...]}, or null for none


class ImageZip(FilesAtPaths):
    """Images in a zip, which is never unpacked.

    A dataset.json at the top of the zip gives the labels and the order of the images, whatever
    their folders. Without it the zip is read like a folder: one folder per class, or no classes.
    """

    def find(self, path: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the images in the order of dataset.json, or sorted by name."""
        named = self.named(path)
        archive, names = opened_zip(listing.existing(path, named, "file", "ImageFolder"), named)
        if LABELS not in archive.namelist():
            classes, labels = listing.by_folder(names, classes, named)
            return in_zip(path, archive, names, classes, labels)
        where = f"{LABELS} of {path}"
        labelled = labels_of(archive, where)
        if labelled is None or classes == ():
            if classes:
                raise DataError(f"{where} has no labels for the classes {some(classes)}; add them")
            return in_zip(path, archive, names, (), [0] * len(names))
        if absent := sorted(set(labelled) - set(names)):
            raise DataError(f"{where} has labels for missing images, {some(absent)}; remove them")
        if unlabelled := sorted(set(names) - set(labelled)):
            raise DataError(
                f"{where} has no label for {some(unlabelled)}; label all images or none"
            )
        labels = list(labelled.values())
        classes = listing.by_number(list(labelled), labels, classes, where)
        return in_zip(path, archive, list(labelled), classes, labels)


def in_zip(
    where: str,
    archive: zipfile.ZipFile,
    names: list[str],
    classes: tuple[str, ...],
    labels: list[int],
) -> ImageFiles:
    """The named images in a zip, stamped by the checksums that it keeps."""
    return ImageFiles(
        where, names, classes, labels, archive.open, lambda name: archive.getinfo(name).CRC
    )


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


def labels_of(archive: zipfile.ZipFile, where: str) -> dict[str, Any] | None:
    """The label of each image in a dataset.json, in its order; None if it says that there are none.

    `where` names the dataset.json in errors (DataError).
    """
    try:
        content = json.loads(archive.read(LABELS))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); fix it") from error
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError) as error:
        raise DataError(f"{where} cannot be read ({error}); create the zip again") from error
    pairs = content.get("labels") if isinstance(content, dict) else content
    if pairs is None and isinstance(content, dict):
        return None
    form = (
        f'{where} must be {{"labels": [["name.png", 0], ...]}}, or have null in place of the list'
    )
    if not isinstance(content, dict) or not isinstance(pairs, list) or not pairs:
        raise DataError(form)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(f"{form}, but it has {json.dumps(pair)[:60]}")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{where} labels {some(twice)} more than once; keep one label for each")
    return dict(pairs)
