"""What is diffused: a first stage turns uint8 images into float tensors of about unit scale."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.data import ImageDataModule


class FirstStage(ABC):
    """The space in which diffusion happens; frozen, and no module of the model that is trained."""

    cache = False  # whether training reads moments that were computed once
    of_pixels = False  # whether pixels themselves are diffused
    data_std = 1.0  # of what is diffused, for those who scale by it and are not told a number

    def figures(self, data: ImageDataModule) -> dict[str, float]:
        """Of reconstructed test images of these data, which are read, where they were measured."""
        return {}

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) uint8 -> (B, c, h, w) float32 of about unit scale."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) float -> (B, C, H, W) uint8."""

    @abstractmethod
    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images -> (c, h, w) of what is diffused; ValueError if not of these."""

    def draw(self, images: Tensor) -> Tensor:
        """What a step is trained on, of images uint8 or of their moments, (B, ., ., .)."""
        return self.encode(images)

    def prepare(self, data: ImageDataModule, device: torch.device) -> None:
        """Looks at the data before training, all ranks together, once they are read."""
        return None

    def facts(self) -> dict[str, object]:
        """Values of the constructor for a run to keep, known once it is prepared."""
        return {}

    def keep(self, folder: Path) -> None:
        """Leaves in the folder of a run what it is reopened with; on rank 0."""
        return None


class Pixels(FirstStage):
    """Diffuses the pixels themselves, in [-1, 1]."""

    of_pixels = True
    data_std = 0.5  # CIFAR-10's

    def encode(self, images: Tensor) -> Tensor:
        """uint8 in [0, 255] -> float32 in [-1, 1]."""
        return to_float(images)

    def decode(self, latents: Tensor) -> Tensor:
        """float in [-1, 1] -> uint8, rounded and clipped."""
        return to_uint8(latents)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of the images."""
        return tuple(image_shape)
