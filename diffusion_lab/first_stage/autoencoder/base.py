"""The base of autoencoders: images (B, C, H, W) in [-1, 1] <-> latents (B, c, h, w).

An image is encoded to moments, the distribution of its latents, and these become latents. The
networks are those of arXiv:2112.10752, smaller. f is the factor 2^(levels - 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import Upsample, downsample
from diffusion_lab.backbone.stage import PixelAttention, PixelResidual
from diffusion_lab.common.ranges import (
    MULTIPLE_OF_4,
    Count,
    Flag,
    Range,
    at_least,
    settings,
    whole_list,
)


class Network(nn.Sequential):
    """Layers in sequence; on a CPU in channels-last layout, where convolutions are then faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def level(in_channels: int, channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    """Builds the residual blocks of a level, and its attention if asked."""
    widths = [in_channels] + [channels] * blocks
    layers = [PixelResidual(*pair, embedding_width=None, dropout=0.0) for pair in pairwise(widths)]
    for layer in layers:
        layer.initialise()
    return [*layers, PixelAttention(channels, None)] if attention else [*layers]


class Encoder(Network):
    """Images (B, C, H, W) -> (B, out_channels, H / f, W / f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, attend: bool
    ):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        width = widths[0]
        for depth, wider in enumerate(widths):
            if depth:
                layers.append(downsample(width))
            layers += level(width, wider, blocks, attend and depth == len(widths) - 1)
            width = wider
        super().__init__(
            *layers, GroupNorm(width, silu=True), nn.Conv2d(width, out_channels, 3, padding=1)
        )


class Decoder(Network):
    """Latents (B, in_channels, h, w) -> images (B, C, f h, f w)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, attend: bool
    ):
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
        for depth in reversed(range(len(widths))):
            # narrow before upsampling, which costs a quarter
            narrower = widths[max(depth - 1, 0)]
            layers += level(width, narrower, blocks, attend and depth == len(widths) - 1)
            width = narrower
            if depth:
                layers.append(Upsample(width))
        super().__init__(
            *layers, GroupNorm(width, silu=True), nn.Conv2d(width, out_channels, 3, padding=1)
        )


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Repeats the last row and column of images (B, C, H, W) until `factor` divides both sides."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


MOST_LEVELS = 6  # downsampling by 32
MULTIPLIERS = Range(
    f"1 to {MOST_LEVELS} whole numbers above 0, one per level; all but the first halve the image",
    lambda value: whole_list(1, shortest=1).allows(value) and len(value) <= MOST_LEVELS,
    [1, 2, 2],
)


@dataclass(eq=False, repr=False)
class Autoencoder(nn.Module, ABC):
    """An encoder, bottleneck and decoder for images of any size.

    The factor is 2^(len(multipliers) - 1); `multipliers` times `channels` is the width of each
    level, finest first.
    """

    kind: ClassVar[str]  # name of its option in the group autoencoder, and in a file
    has_prior = False  # whether latents drawn from N(0, 1) decode to images

    image_shape: tuple[int, int, int]
    channels: Annotated[int, MULTIPLE_OF_4]
    multipliers: Annotated[Sequence[int], MULTIPLIERS]
    blocks: Count
    attention: Flag

    def build(self, latent_channels: int, moments: int) -> None:
        """Builds the encoder and the decoder; the arguments are numbers of channels."""
        super().__init__()
        self.factor = 2 ** (len(self.multipliers) - 1)
        image_channels, *sides = self.image_shape
        self.latent_shape = (latent_channels, *(-(-side // self.factor) for side in sides))
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        self.encoder = Encoder(image_channels, moments, widths, self.blocks, self.attention)
        self.decoder = Decoder(latent_channels, image_channels, widths, self.blocks, self.attention)

    def moments(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, moments, h, w) float32."""
        return self.encoder(pad_to_multiple(images, self.factor)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) -> images (B, C, H, W) float32, about in [-1, 1]."""
        return self.decode_quantised(self.quantise(latents))

    def decode_quantised(self, latents: Tensor) -> Tensor:
        """Decodes latents that are quantised already."""
        _, height, width = self.image_shape
        return self.decoder(latents)[..., :height, :width].float()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) -> their reconstructions, and the bottleneck's loss, ().

        The loss is in units of the mean error of a pixel.
        """
        latents, loss = self.bottleneck(self.moments(images))
        return self.decode_quantised(latents), loss

    def mean(self, moments: Tensor) -> Tensor:
        """Returns the latents that represent an image: its moments, or the mean of a posterior."""
        return moments

    def sample(self, moments: Tensor) -> Tensor:
        """Draws latents of an image from torch's generator, if there is a posterior."""
        return moments

    def variance(self, moments: Tensor) -> Tensor:
        """Returns the variance of `sample`."""
        return torch.zeros_like(self.mean(moments))

    def quantise(self, latents: Tensor) -> Tensor:
        """Returns the nearest latents that the decoder was trained on."""
        return latents

    @abstractmethod
    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the latents to decode in training, with gradients to moments, and the loss ()."""

    @abstractmethod
    def statistics(self, moments: Tensor) -> Tensor:
        """Returns the sums over images, (n,), that `metrics` are computed from."""

    @abstractmethod
    def metrics(self, statistics: Tensor, images: int) -> dict[str, float]:
        """Computes the metrics of the bottleneck from the statistics of `images` images."""


LOG_VARIANCE = (-30.0, 20.0)  # beyond these nothing is gained and exp overflows


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, (B,), from a mean and a log-variance (B, ...)."""
    nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return nats.flatten(1).sum(1)


@settings
class KLAutoencoder(Autoencoder):
    """Latent diffusion's first stage; with `kl_weight` 1 a VAE, whose prior can be sampled.

    `kl_weight` counts nats against the error summed over an image, as in latent diffusion.
    """

    kind = "kl"
    has_prior = True

    latent_channels: Count
    kl_weight: Annotated[float, at_least(0).as_in(1e-6)]

    def __post_init__(self) -> None:
        self.build(self.latent_channels, moments=2 * self.latent_channels)

    def mean_and_log_variance(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Splits moments into the posterior's mean and log-variance."""
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def mean(self, moments: Tensor) -> Tensor:
        return self.mean_and_log_variance(moments)[0]

    def variance(self, moments: Tensor) -> Tensor:
        return self.mean_and_log_variance(moments)[1].exp()

    def sample(self, moments: Tensor) -> Tensor:
        mean, log_variance = self.mean_and_log_variance(moments)
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)

    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        nats = kl_divergence(*self.mean_and_log_variance(moments)).mean()
        return self.sample(moments), self.kl_weight * nats / prod(self.image_shape)

    def statistics(self, moments: Tensor) -> Tensor:
        return kl_divergence(*self.mean_and_log_variance(moments)).sum()[None]

    def metrics(self, statistics: Tensor, images: int) -> dict[str, float]:
        """Returns the mean divergence of an image's posterior from the prior, in nats."""
        return {"kl": statistics.item() / images}
