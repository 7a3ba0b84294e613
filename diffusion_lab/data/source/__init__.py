"""Sources of images: one class for each kind of files."""

from diffusion_lab.data.source.absent import Absent
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.source.cifar10_zip import CIFAR10Zip
from diffusion_lab.data.source.gaussian_mixture import GaussianMixture
from diffusion_lab.data.source.huggingface import HuggingFace
from diffusion_lab.data.source.image_folder import ImageFolder
from diffusion_lab.data.source.image_zip import ImageZip
from diffusion_lab.data.source.torchvision_sets import CIFAR10, FashionMNIST, FashionMNISTShades
from diffusion_lab.data.source.two_moons import TwoMoons
from diffusion_lab.data.source.verified_files import DataError
