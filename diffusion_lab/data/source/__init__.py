"""Sources of images: one class for each kind of files."""

from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.base import Absent, DataSource, Split
from diffusion_lab.data.source.huggingface import HuggingFace
from diffusion_lab.data.source.image_folder import ImageFolder, ImageZip
from diffusion_lab.data.source.known_sets import (
    CIFAR10,
    CIFAR10Zip,
    FashionMNIST,
    FashionMNISTShades,
)
from diffusion_lab.data.source.plane import GaussianMixture, TwoMoons
