"""Latents under a Gaussian posterior, pulled towards N(0, 1) (arXiv:1312.6114, 2112.10752)."""

from math import prod
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, at_least, settings
from diffusion_lab.first_stage.autoencoder.base import Autoencoder

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
