"""Latents that are entries of a codebook (VQ-VAE, arXiv:1711.00937; FSQ, arXiv:2309.15505).

What is diffused are the vectors before they are quantised, as in latent diffusion; decoding
quantises. B batch, c channels, h w height and width of the latents, K codes.
"""

import importlib
from collections.abc import Sequence
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from diffusion_lab.common.errors import is_number, is_whole, require
from diffusion_lab.first_stage.autoencoder.base import Autoencoder


class Quantised(Autoencoder):
    """An autoencoder whose bottleneck gives codes (B, h, w) below `codes`."""

    codes: int

    def mean(self, moments: Tensor) -> Tensor:
        return moments

    def sample(self, moments: Tensor) -> Tensor:
        return moments

    def snap(self, latents: Tensor) -> Tensor:
        return self.quantise(latents)[0]

    def observe(self, moments: Tensor) -> Tensor:
        return torch.bincount(self.quantise(moments)[1].flatten().long(), minlength=self.codes)

    def figures(self, observed: Tensor, images: int) -> dict[str, float]:
        """The share of codes in use, and exp of the entropy of their use, at most K."""
        share = observed.double() / observed.sum()
        return {
            "codebook_usage": (observed > 0).double().mean().item(),
            "perplexity": torch.special.entr(share).sum().exp().item(),
        }

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised latents, with gradients as if they were not; codes; commitment, ()."""
        # distances between nearby vectors are lost in bf16
        with torch.autocast(latents.device.type, enabled=False):
            quantised, codes, *commitment = self.quantiser(latents.float())
        return quantised, codes, sum(commitment, latents.new_zeros(()))


class VQ(Quantised):
    """A codebook of moving averages, begun by k-means, whose dead codes are taken up anew.

    A code is dead if a batch takes it fewer than `revive_below` times, on average over
    1 / (1 - `decay`) batches; it then becomes a vector of the batch.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: bool,
        codes: int,
        decay: float,
        revive_below: float,
        commitment_weight: float,
    ):
        super().__init__(
            image_shape, latent_channels, latent_channels, channels, multipliers, blocks, attention
        )
        require(is_whole(codes, 2), "autoencoder.codes", codes, "a whole number of at least 2", 512)
        right = is_number(decay) and 0 < decay < 1
        require(right, "autoencoder.decay", decay, "a number between 0 and 1", 0.99)
        for key, value in (
            ("revive_below", revive_below),
            ("commitment_weight", commitment_weight),
        ):
            right = is_number(value) and value >= 0
            require(right, f"autoencoder.{key}", value, "a number of at least 0")
        self.codes = codes
        self.commitment_weight = commitment_weight
        self.quantiser = vector_quantize_pytorch().VectorQuantize(
            latent_channels,
            codes,
            decay=decay,
            kmeans_init=True,
            threshold_ema_dead_code=revive_below,
            rotation_trick=False,  # straight through
            accept_image_fmap=True,
        )

    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        quantised, _, commitment = self.quantise(moments)
        return quantised, self.commitment_weight * commitment.sum()


class FSQ(Quantised):
    """Each of len(`levels`) channels is rounded to one of its levels; K is their product."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: bool,
        levels: Sequence[int],
    ):
        require(
            len(levels) > 0 and all(is_whole(each, 3) for each in levels),
            "autoencoder.levels",
            list(levels),
            "whole numbers, 3 or more each",
            "[8,5,5,5]",
        )
        width = len(levels)
        super().__init__(image_shape, width, width, channels, multipliers, blocks, attention)
        self.codes = prod(levels)
        self.quantiser = vector_quantize_pytorch().FSQ(list(levels))

    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        quantised, _, none = self.quantise(moments)
        return quantised, none


def vector_quantize_pytorch() -> ModuleType:
    """The package; raises ValueError where it is missing."""
    try:
        return importlib.import_module("vector_quantize_pytorch")
    except ImportError as error:
        raise ValueError(
            "codebooks need vector-quantize-pytorch; run `pip install 'diffusion-lab[latent]'`"
        ) from error
