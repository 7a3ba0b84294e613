"""Ancestral samplers: a step to a cleaner level than asked for, then fresh noise up to it."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, posterior
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.time_grid import TimeGrid

VARIANCES = ("fixed_small", "fixed_large", "learned")


def check_variance(variance: str) -> None:
    """Refuses a name that `ancestral_step` does not know."""
    if variance not in VARIANCES:
        raise ValueError(
            f"sampler.variance={variance} is unknown; use one of {', '.join(VARIANCES)}"
        )


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
    estimate.variance in [0, 1] (arXiv:2102.09672, equation 15).
    """
    if variance == "learned" and estimate.variance is None:
        raise ValueError(
            "sampler.variance=learned needs a model trained with objective/variance_loss=hybrid; "
            "use sampler.variance=fixed_small with this one"
        )
    x, small, large = posterior(x, estimate.x0, here, there, eta)
    if eta == 0 or there.sigma == 0:
        return x
    if variance == "learned":
        added = small * (large / small) ** estimate.variance
    else:
        added = small if variance == "fixed_small" else large
    return x + added.sqrt() * randn_like(x)


class Ancestral(Sampler):
    """DDPM at eta = 1 (arXiv:2006.11239), DDIM at eta = 0, and all between (arXiv:2010.02502).

    `variance` is the fresh noise's: fixed_small is the posterior's, fixed_large the forward step's,
    for about as many steps as the model was trained with, and learned the network's, between the
    two (improved DDPM). All are times eta^2.
    """

    def __init__(
        self,
        steps: int,
        time_grid: TimeGrid,
        eta: float = 1.0,
        variance: str = "fixed_small",
    ):
        super().__init__(steps, time_grid)
        if not 0 <= eta <= 1:
            raise ValueError(f"sampler.eta={eta} must be in [0, 1]: 0 is DDIM, 1 is DDPM")
        check_variance(variance)
        self.eta = eta
        self.variance = variance

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            estimate = denoise(x, here)
            x = ancestral_step(x, estimate, here, there, randn_like, self.eta, self.variance)
            yield x
