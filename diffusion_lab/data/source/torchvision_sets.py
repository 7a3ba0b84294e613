"""The two data sets of this project, from torchvision's files."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from diffusion_lab.data.source import acquire
from diffusion_lab.data.source.base import DataSource, Split


class Downloaded(DataSource):
    """A data set whose files are fetched into a folder under `root`, and verified."""

    acquire: ClassVar[Callable[[Path], Path]]  # returns the folder of the verified files

    def __init__(self, root: str = "data"):
        self.root = Path(root)

    def prepare(self) -> None:
        """Fetches the files if they are not under `root`; raises DataError."""
        type(self).acquire(self.root)

    def load(self) -> tuple[Split, Split]:
        """Reads the verified files."""
        folder = type(self).acquire(self.root)  # may hold pickles: never opened unverified
        return self.read(folder, train=True), self.read(folder, train=False)

    @abstractmethod
    def read(self, folder: Path, train: bool) -> Split:
        """Reads the training or the test split from the folder of the files."""


class FashionMNIST(Downloaded):
    """60,000 training and 10,000 test images of clothes, 1 x 28 x 28 (arXiv:1708.07747)."""

    native_shape = (1, 28, 28)
    class_names = tuple(datasets.FashionMNIST.classes)
    acquire = acquire.fashion_mnist

    def read(self, folder: Path, train: bool) -> Split:
        part = folder / ("train" if train else "t10k")
        images = read_image_file(f"{part}-images-idx3-ubyte")  # (N, 28, 28)
        return Split(images[:, None], read_label_file(f"{part}-labels-idx1-ubyte"))


class FashionMNISTShades(FashionMNIST):
    """FashionMNIST with two attributes in its labels: label i is class i // 3 and shade i % 3.

    Shades are the thirds of each class's training images, by mean brightness from dark to bright.
    """

    class_names = tuple(
        f"{name}, {shade}"
        for name in FashionMNIST.class_names
        for shade in ("dark", "middle", "bright")
    )

    def load(self) -> tuple[Split, Split]:
        """Reads FashionMNIST with labels of both attributes."""
        train, test = super().load()
        return shaded(train, train, 3), shaded(test, train, 3)


def shaded(split: Split, reference: Split, shades: int) -> Split:
    """Labels a split by class * shades + shade; shades divide each class of `reference` evenly."""
    brightness, known = (part.images.float().mean((1, 2, 3)) for part in (split, reference))
    parts = torch.linspace(0, 1, shades + 1)[1:-1]
    labels = split.labels * shades
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
        data = datasets.CIFAR10(folder.parent, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Split(images, torch.tensor(data.targets))
