"""What is diffused: a first stage turns uint8 images into float tensors of about unit scale."""

from typing import Protocol

from torch import Tensor

from diffusion_lab.images import to_float, to_uint8


class FirstStage(Protocol):
    """The space in which diffusion happens."""

    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) uint8 -> (B, c, h, w) float32 of about unit scale."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) float -> (B, C, H, W) uint8."""
        ...

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images -> (c, h, w) of what is diffused."""
        ...


class Pixels:
    """Diffuses the pixels themselves, in [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 in [0, 255] -> float32 in [-1, 1]."""
        return to_float(images)

    def decode(self, latents: Tensor) -> Tensor:
        """float in [-1, 1] -> uint8, rounded and clipped."""
        return to_uint8(latents)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of the images."""
        return tuple(image_shape)
