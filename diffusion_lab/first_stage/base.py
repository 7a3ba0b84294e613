"""First stages turn uint8 images into the float tensors of about unit scale to be diffused."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.data import EncodedImages, ImageData

Shape = tuple[int, int, int]


class FirstStage(ABC):
    """The space in which diffusion happens; it is frozen, and no part of the trained model.

    It is built for images of one shape; `latent_shape` is the (c, h, w) that is diffused.
    """

    cache = False  # whether the training images are encoded once, before training
    data_std = 1.0  # std of the diffused tensors, where no other number is configured
    of_pixels = False  # whether the images themselves are diffused, in [-1, 1]

    def __init__(self, image_shape: Shape, latent_shape: Shape):
        self.image_shape = tuple(image_shape)
        self.latent_shape = tuple(latent_shape)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) uint8 -> (B, c, h, w) float32 of about unit scale."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) float -> (B, C, H, W) uint8."""

    def moments(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) uint8 to what `draw` draws from, (B, ., h, w) float32."""
        return self.encode(images)

    def draw(self, moments: Tensor) -> Tensor:
        """Draws the latents of a training step, (B, c, h, w) float32, from moments (B, ., h, w)."""
        return moments

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        """Measures the loaded data, and encodes them if `cache` is set; called on all ranks."""
        return None

    def facts(self) -> dict[str, object]:
        """Returns constructor arguments for a run to save, which are known after `prepare`."""
        return {}

    def reconstruction_metrics(self, data: ImageData) -> dict[str, float]:
        """Metrics (rFID, ...) of this data's reconstructed test images, if they were measured.

        The data must have been read.
        """
        return {}

    def copy_into(self, folder: Path) -> None:
        """Copies the files that reopen the first stage into a run folder; called on rank 0."""
        return None


class Pixels(FirstStage):
    """Diffuses the pixels themselves, in [-1, 1]."""

    of_pixels = True
    data_std = 0.5  # the std of CIFAR-10

    def __init__(self, image_shape: Shape):
        super().__init__(image_shape, image_shape)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 in [0, 255] -> float32 in [-1, 1]."""
        return to_float(images)

    def decode(self, latents: Tensor) -> Tensor:
        """float in [-1, 1] -> uint8, rounded and clipped."""
        return to_uint8(latents)
