"""The trapezoid rule for dx = x0 d(alpha) + eps d(sigma)."""

import math
from itertools import pairwise
from typing import Annotated

from diffusion_lab.common.ranges import Positive, at_least, settings
from diffusion_lab.diffusion.noise import jump, renoise
from diffusion_lab.diffusion.sampler.base import Sampler

MAX_RAISE = math.sqrt(2) - 1  # no more new noise in a step than there is already


@settings
class Heun(Sampler):
    """Second order, 2 steps - 1 network calls; EDM's sampler where alpha = 1.

    arXiv:2206.00364, algorithm 2; with alpha = 1 - t and no churn it is Heun's method for rectified
    flow. `churn` above 0 first raises sigma / alpha by its share of a step, churn / steps, while it
    is in [churn_min, churn_max]; the noise for that has standard deviation `noise_scale`. Beyond
    the schedule's noisiest level there is nothing to raise to, so its first step has no churn.
    """

    churn: Annotated[float, at_least(0)] = 0.0
    churn_min: Annotated[float, at_least(0)] = 0.0
    churn_max: float = math.inf
    noise_scale: Positive = 1.0

    def __post_init__(self) -> None:
        low, high = self.churn_min, self.churn_max
        if not low <= high:
            raise ValueError(f"churn_min={low} must be at most churn_max={high}")

    def walk(self, denoise, x, levels, schedule, randn_like):
        gamma = min(self.churn / self.steps, MAX_RAISE)
        for here, there in pairwise(levels):
            ratio = here.sigma / here.alpha
            # from pure noise no level is noisier, and renoise divides by alpha
            if gamma > 0 and here.alpha > 0 and self.churn_min <= ratio <= self.churn_max:
                raised = schedule.at_logsnr(here.logsnr - 2 * math.log1p(gamma))
                x = renoise(x, here, raised, self.noise_scale * randn_like(x))
                here = raised
            x0 = denoise(x, here).x0
            if there.sigma > 0:  # eps is 0/0 on clean data: there the last step stays an Euler step
                end = denoise(jump(x, x0, here, there), there).x0
                # Averaging x0 and eps over both ends, with eps = (x - alpha x0) / sigma, leaves x
                # with the coefficient that it has in jump, and the two x0 with these shares of it.
                x0 = x0 + here.sigma / (2 * there.sigma) * (end - x0)
            x = jump(x, x0, here, there)
            yield x
