"""Ancestral samplers: a step to a cleaner level than asked for, then fresh noise up to it."""

from itertools import pairwise

from diffusion_lab.noise import posterior

from .base import Sampler
from .time_grid import TimeGrid

VARIANCES = ("fixed_small", "fixed_large")


class Ancestral(Sampler):
    """DDPM at eta = 1 (arXiv:2006.11239), DDIM at eta = 0, and all between (arXiv:2010.02502).

    `variance` is the fresh noise's: fixed_small is the posterior's, fixed_large the forward step's,
    for about as many steps as the model was trained with. Both are times eta^2.
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
        if variance not in VARIANCES:
            raise ValueError(
                f"sampler.variance={variance} is unknown; use one of {', '.join(VARIANCES)}"
            )
        self.eta = eta
        self.variance = variance

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x0 = denoise(x, here).x0
            x, small, large = posterior(x, x0, here, there, self.eta)
            if self.eta > 0 and there.sigma > 0:  # no noise on clean data
                variance = small if self.variance == "fixed_small" else large
                x = x + variance.sqrt() * randn_like(x)
            yield x
