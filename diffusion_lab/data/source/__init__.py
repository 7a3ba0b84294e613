"""Sources of images: one class for each kind of files."""

from diffusion_lab.data.source.base import Absent, DataSource, Split
from diffusion_lab.data.source.cifar10_zip import CIFAR10Zip
from diffusion_lab.data.source.huggingface import HuggingFace
from diffusion_lab.data.source.image_folder import ImageFolder, ImageZip
from diffusion_lab.data.source.plane import GaussianMixture, TwoMoons
from diffusion_lab.data.source.torchvision_sets import CIFAR10, FashionMNIST, FashionMNISTShades
from diffusion_lab.data.source.verified_files import DataError
