"""Ancestral samplers: a step to a cleaner level than asked for, then fresh noise up to it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

from torch import Tensor

from diffusion_lab.common.ranges import Fraction, one_of, settings
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, posterior
from diffusion_lab.diffusion.sampler.base import Sampler

Variance = Annotated[str, one_of("fixed_small", "fixed_large", "learned")]


def ancestral_step(
    x: Tensor,
    estimate: Estimate,
    here: NoiseLevel,
    there: NoiseLevel,
    randn_like: Callable[[Tensor], Tensor],
    eta: float,
    variance: str,
) -> Tensor:
    """x (B, ...) at `there`: the posterior's mean, and fresh noise unless that is clean data.

    The learned variance lies between the logs of the small and the large one, at
    estimate.log_variance_weight in [0, 1] (arXiv:2102.09672, equation 15).
    """
    weight = estimate.log_variance_weight if variance == "learned" else None
    if variance == "learned" and weight is None:
        raise ValueError("variance=learned needs a model that learned its reverse variance")
    x, small, large = posterior(x, estimate.x0, here, there, eta)
    if eta == 0 or there.sigma == 0:
        return x
    if weight is not None:
        added = small * (large / small) ** weight
    else:
        added = small if variance == "fixed_small" else large
    return x + added.sqrt() * randn_like(x)


@settings
class Ancestral(Sampler):
    """DDPM at eta = 1 (arXiv:2006.11239), DDIM at eta = 0, and all between (arXiv:2010.02502).

    `variance` is the fresh noise's: fixed_small is the posterior's, fixed_large the forward step's,
    for about as many steps as the model was trained with, and learned the network's, between the
    two (improved DDPM). All are times eta^2.
    """

    eta: Fraction = 1.0
    variance: Variance = "fixed_small"

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            estimate = denoise(x, here)
            x = ancestral_step(x, estimate, here, there, randn_like, self.eta, self.variance)
            yield x
