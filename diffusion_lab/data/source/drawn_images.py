"""Images that another program drew, at the size of the data: in a folder, a zip, or an .npz."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.common.formats import some
from diffusion_lab.data.source import listing
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.decoding import check_memory, decode_into, infer
from diffusion_lab.data.source.image_folder import in_folder, in_zip
from diffusion_lab.data.source.listing import LABELS, ImageFiles, labels_of

Shape = tuple[int, int, int]
# arrays of images and their labels: those of `diffusion-lab sample save=npz`, and of ADM's programs
ARRAYS = {"images": "labels", "arr_0": "arr_1"}


def read_drawn(path: str, shape: Shape, classes: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Reads all images, uint8 (n, *shape), and their labels, int64 (n,), or None without labels.

    Labels are indices into `classes`: by folders that have the names or the numbers of classes, by
    a zip's dataset.json, or by an array beside the images. Raises DataError, also for an image of
    another shape (C, H, W).
    """
    where, place = f"images={path}", Path(path)
    kind = place.suffix if place.is_file() else ""  # a pipe or a device may never end
    if kind == ".npz":
        with opened_npz(place, where) as file:
            images, labels = images_in(file, where, shape), labels_in(file, where, classes)
    elif place.is_dir() or kind == ".zip":
        files, labels = _listed(place, where, classes)
        images = _decoded(files, where, shape)
    else:
        problem = "is another kind of file" if place.exists() else "does not exist"
        raise DataError(f"{where} {problem}; give a folder, a .zip or an .npz of images")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{where} has {len(images):,} images but {len(labels):,} labels")
    return images, labels


def opened_npz(path: Path, where: str) -> np.lib.npyio.NpzFile:
    """Opens an .npz without reading its arrays; code in it is never run. Raises DataError."""
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where} is not a readable .npz ({error}); write it again") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataError(f"{where} is a single array, not an .npz; write it by numpy's savez")
    return file


def array_in(file: np.lib.npyio.NpzFile, name: str, where: str) -> np.ndarray:
    """Reads an array of an .npz; raises DataError if it is damaged or holds Python objects."""
    try:
        return file[name]
    except Exception as error:  # a damaged file may give any: of zlib, of memory, ...
        raise DataError(
            f"{where} has an array {name} that cannot be read ({error}); write it again, with "
            "numbers alone"
        ) from error


def images_name(file: np.lib.npyio.NpzFile, where: str) -> str:
    """The name of the array of images in an .npz; raises DataError if it has none."""
    name = next((name for name in ARRAYS if name in file.files), None)
    if name is None:
        raise DataError(
            f"{where} has no array {' or '.join(ARRAYS)}, only {some(file.files)}; write the "
            "images into one of these"
        )
    return name


def images_in(file: np.lib.npyio.NpzFile, where: str, shape: Shape) -> Tensor:
    """The images in an .npz, uint8 (n, *shape); raises DataError, also for another shape."""
    name = images_name(file, where)
    pixels, (channels, height, width) = array_in(file, name, where), shape
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
        raise DataError(
            f"{where} has an array {name} that is {pixels.dtype} {pixels.shape}; images of these "
            f"data are uint8 (n, {height}, {width}, {channels})"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def labels_in(file: np.lib.npyio.NpzFile, where: str, classes: Sequence[str]) -> Tensor | None:
    """The labels of the images in an .npz, int64 (n,); None without any. May raise DataError."""
    name = ARRAYS[images_name(file, where)]
    if name not in file.files or not classes:
        return None
    labels, known = array_in(file, name, where), range(len(classes))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not set(labels.tolist()) <= set(known):
        raise DataError(
            f"{where} has an array {name} that is no list of labels from 0 to {known[-1]}, the "
            "classes of the data; correct or remove it"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _listed(place: Path, where: str, classes: Sequence[str]) -> tuple[ImageFiles, Tensor | None]:
    """The images in a folder or a zip, sorted by name, and their labels."""
    found = in_folder(place, where) if place.is_dir() else in_zip(place, where, where)
    names = found.names
    files = ImageFiles(where, names, (), [0] * len(names), found.open, found.stamp)
    content = None if place.is_dir() else found.read(LABELS)
    numbered = labels_of(content, f"{where}: {LABELS}") if content else None
    labels = _by_folder(names, classes)
    if numbered is not None and classes:
        if missing := sorted(set(names) - set(numbered)):
            raise DataError(f"{where} has no label for {some(missing)}; label all images or none")
        listing.by_number(list(numbered), list(numbered.values()), tuple(classes), where)
        labels = [numbered[name] for name in names]
    return files, None if labels is None else torch.tensor(labels)


def _by_folder(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """The labels of images whose folders all have names of classes, or all numbers of classes."""
    folders = [name.rpartition("/")[0] for name in names]
    for known in (classes, map(str, range(len(classes)))):
        labels = {name: label for label, name in enumerate(known)}
        if labels.keys() >= set(folders):
            return [labels[folder] for folder in folders]
    return None


def _decoded(files: ImageFiles, where: str, shape: Shape) -> Tensor:
    (height, width), _ = infer(files)
    if (height, width) != shape[1:]:
        raise DataError(
            f"{where} has images of {height}x{width} pixels, and the data {shape[1]}x{shape[2]}; "
            "give images of the data's size"
        )
    check_memory(len(files), shape)
    images = torch.zeros(len(files), *shape, dtype=torch.uint8)
    if bad := decode_into(images.numpy(), files, "refuse"):
        named = [f"{files.names[i]} ({reason.partition(';')[0]})" for i, reason in bad.items()]
        raise DataError(
            f"{where} has {len(bad):,} images that cannot be used: {some(named)}; fix or remove "
            "them"
        )
    return images
