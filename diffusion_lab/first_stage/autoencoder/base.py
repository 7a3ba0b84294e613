"""What is common to autoencoders: images (B, C, H, W) in [-1, 1] <-> latents (B, c, h, w).

An image goes to its moments, which say what its latents may be, and these to latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.common.errors import is_whole, require
from diffusion_lab.first_stage.autoencoder.network import Decoder, Encoder, pad_to_multiple

MOST_LEVELS = 6  # a factor of 32


class Autoencoder(nn.Module, ABC):
    """Encoder, bottleneck and decoder for images of any size, by factor 2^(len(multipliers) - 1).

    `multipliers` times `channels` is the width of each level, finest first. Raises ValueError for
    sizes that cannot be.
    """

    has_prior = False  # whether N(0, 1) in its latent space is decoded to images

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_channels: int,
        moments: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: bool,
    ):
        super().__init__()
        require(
            is_whole(channels, 4) and channels % 4 == 0,
            "autoencoder.channels",
            channels,
            "a multiple of 4 above 0",
            32,
        )
        require(
            1 <= len(multipliers) <= MOST_LEVELS and all(is_whole(each, 1) for each in multipliers),
            "autoencoder.multipliers",
            list(multipliers),
            f"1 to {MOST_LEVELS} levels, of whole numbers above 0; each but the first halves the "
            "image",
            "[1,2,2]",
        )
        self.factor = 2 ** (len(multipliers) - 1)
        for key, value in (("blocks", blocks), ("latent_channels", latent_channels)):
            require(is_whole(value, 1), f"autoencoder.{key}", value, "a whole number above 0")
        image_channels, self.height, self.width = image_shape
        sides = (-(-side // self.factor) for side in image_shape[1:])
        self.latent_shape = (latent_channels, *sides)
        widths = [channels * multiplier for multiplier in multipliers]
        self.encoder = Encoder(image_channels, moments, widths, blocks, attention)
        self.decoder = Decoder(latent_channels, image_channels, widths, blocks, attention)

    def moments(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, moments, h, w) float32."""
        return self.encoder(pad_to_multiple(images, self.factor)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) -> images (B, C, H, W) float32, about in [-1, 1]."""
        return self.paint(self.snap(latents))

    def paint(self, latents: Tensor) -> Tensor:
        """What the decoder makes of latents that are as in training."""
        return self.decoder(latents)[..., : self.height, : self.width].float()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) -> what came back of them, and the bottleneck's loss, ().

        That loss is in units of the mean error of a pixel.
        """
        latents, loss = self.bottleneck(self.moments(images))
        return self.paint(latents), loss

    @abstractmethod
    def mean(self, moments: Tensor) -> Tensor:
        """The latents that stand for an image."""

    @abstractmethod
    def sample(self, moments: Tensor) -> Tensor:
        """Latents of an image, drawn from torch's generator."""

    def spread(self, moments: Tensor) -> Tensor:
        """The variance of `sample`."""
        return torch.zeros_like(self.mean(moments))

    def snap(self, latents: Tensor) -> Tensor:
        """The nearest latents that the decoder knows."""
        return latents

    @abstractmethod
    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """The latents to decode in training, with gradients to the moments, and the loss, ()."""

    @abstractmethod
    def observe(self, moments: Tensor) -> Tensor:
        """What figures are made of, summed over the images (n,)."""

    @abstractmethod
    def figures(self, observed: Tensor, images: int) -> dict[str, float]:
        """Figures of the bottleneck, from sums over so many images."""
