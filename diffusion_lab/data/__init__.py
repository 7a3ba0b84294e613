"""Data sets, each one uint8 tensor per split."""

from diffusion_lab.data.datamodule import ImageDataModule
from diffusion_lab.data.huggingface import HuggingFaceDataModule
from diffusion_lab.data.image_folder import ImageFolderDataModule
from diffusion_lab.data.image_zip import ImageZipDataModule
from diffusion_lab.data.torchvision_sets import (
    CIFAR10DataModule,
    FashionMNISTDataModule,
    FashionMNISTShadesDataModule,
)
from diffusion_lab.data.two_moons import TwoMoonsDataModule
from diffusion_lab.data.verified_files import DataError

__all__ = [
    "CIFAR10DataModule",
    "DataError",
    "FashionMNISTDataModule",
    "FashionMNISTShadesDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageZipDataModule",
    "TwoMoonsDataModule",
]
