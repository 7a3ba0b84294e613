"""Latents that are entries of a codebook (VQ-VAE, arXiv:1711.00937; FSQ, arXiv:2309.15505).

The vectors before quantisation are diffused, as in latent diffusion; decoding quantises them.
B batch, c channels, h w height and width of the latents, K codes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import torch
from torch import Tensor

from diffusion_lab.common import messages
from diffusion_lab.common.ranges import Count, at_least, inside, settings, whole, whole_list
from diffusion_lab.first_stage.autoencoder.base import Autoencoder

PACKAGE = ("vector_quantize_pytorch", "latent", "a codebook")  # package, extra, what needs it


class Quantised(Autoencoder):
    """An autoencoder whose bottleneck gives codes (B, h, w) below `codes`."""

    codes: int
    commitment_weight: float
    quantiser: Any

    def bottleneck(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        quantised, _, commitment = self.assign(moments)
        return quantised, self.commitment_weight * commitment.sum()

    def quantise(self, latents: Tensor) -> Tensor:
        return self.assign(latents)[0]

    @abstractmethod
    def vectors(self, codes: Tensor) -> Tensor:
        """The latents (B, c, h, w) of codes (B, h, w) int64."""

    def statistics(self, moments: Tensor) -> Tensor:
        return torch.bincount(self.assign(moments)[1].flatten().long(), minlength=self.codes)

    def metrics(self, statistics: Tensor, images: int) -> dict[str, float]:
        """Returns the share of codes in use, and exp of the entropy of their use, at most K."""
        share = statistics.double() / statistics.sum()
        return {
            "codebook_usage": (statistics > 0).double().mean().item(),
            "perplexity": torch.special.entr(share).sum().exp().item(),
        }

    def assign(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assigns a code to each vector.

        Returns the quantised latents, with gradients as if they were not quantised, the codes, and
        the commitment loss ().
        """
        # bf16 loses the distances between nearby vectors
        with torch.autocast(latents.device.type, enabled=False):
            quantised, codes, *commitment = self.quantiser(latents.float())
        return quantised, codes, sum(commitment, latents.new_zeros(()))


@settings
class VQAutoencoder(Quantised):
    """A codebook of moving averages, initialised by k-means, whose dead codes are replaced.

    A code is dead if a batch takes it fewer than `revive_below` times, on average over
    1 / (1 - `decay`) batches; it then becomes a vector of the batch.
    """

    kind = "vq"

    latent_channels: Count
    codes: Annotated[int, whole(2).as_in(512)]
    decay: Annotated[float, inside(0, 1).as_in(0.99)]
    revive_below: Annotated[float, at_least(0)]
    commitment_weight: Annotated[float, at_least(0)]

    def __post_init__(self) -> None:
        self.build(self.latent_channels, moments=self.latent_channels)
        self.quantiser = messages.package(*PACKAGE).VectorQuantize(
            self.latent_channels,
            self.codes,
            decay=self.decay,
            kmeans_init=True,
            threshold_ema_dead_code=self.revive_below,
            rotation_trick=False,  # straight-through gradients instead
            accept_image_fmap=True,
        )

    def vectors(self, codes: Tensor) -> Tensor:
        return self.quantiser.get_output_from_indices(codes)


@settings
class FSQAutoencoder(Quantised):
    """An autoencoder that rounds channel i to one of levels[i] values; K is their product."""

    kind = "fsq"
    commitment_weight = 0.0  # there is no codebook to commit to

    levels: Annotated[Sequence[int], whole_list(3, shortest=1).as_in([8, 5, 5, 5])]

    def __post_init__(self) -> None:
        self.build(len(self.levels), moments=len(self.levels))
        self.codes = prod(self.levels)
        self.quantiser = messages.package(*PACKAGE).FSQ(list(self.levels))

    def vectors(self, codes: Tensor) -> Tensor:
        return self.quantiser.indices_to_codes(codes)
