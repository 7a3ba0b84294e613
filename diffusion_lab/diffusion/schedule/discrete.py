"""Schedules given as a table of N levels; index i sits at t = (i + 1) / N, clean data at t = 0."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_lab.common.ranges import at_least, inside, ranges, whole
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule.base import NoiseSchedule


class Table(NoiseSchedule):
    """alpha^2 = product of (1 - beta) over the steps so far, alpha^2 + sigma^2 = 1.

    Between its points log(alpha^2) is linear in t, so alpha and sigma are defined on all of [0, 1]
    and any time grid may be used.
    """

    discrete_steps: int

    def __init__(self, betas: Tensor):
        self.discrete_steps = len(betas)
        # log(alpha^2) at t = 0, 1/N, ..., 1                       (N + 1,)
        self.log_alpha2 = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.log_alpha2.to(t.device, non_blocking=True)
        position = t * self.discrete_steps
        index = position.long().clamp(0, self.discrete_steps - 1)
        log_alpha2 = torch.lerp(table[index], table[index + 1], position - index)
        # 1 - alpha^2 cancels near t = 0
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        rising = -self.log_alpha2.to(logsnr.device, non_blocking=True)
        # alpha^2 = sigmoid(logsnr); the default threshold of 20 would drop e^-20
        wanted = softplus(-logsnr.double(), threshold=700)
        index = torch.searchsorted(rising, wanted).clamp(1, self.discrete_steps) - 1
        beyond = (wanted - rising[index]) / (rising[index + 1] - rising[index])
        return self(((index + beyond) / self.discrete_steps).clamp(0, 1))


class DDPMLinear(Table):
    """N steps whose betas grow linearly (arXiv:2006.11239).

    beta_start and beta_end are for 1000 steps; other tables have 1000 / N times as much per
    step, the rule of arXiv:2102.09672's code, and so end at about the same noise.
    """

    @ranges(steps=whole(1), beta_start=inside(0, 1), beta_end=inside(0, 1))
    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        first, last = beta_range(steps, beta_start, beta_end)
        super().__init__(torch.linspace(first, last, steps, dtype=torch.float64))


class DDPMScaledLinear(Table):
    """N steps whose betas' square roots grow linearly, Stable Diffusion's (arXiv:2112.10752).

    beta_start and beta_end are for 1000 steps, as in `DDPMLinear`.
    """

    @ranges(steps=whole(1), beta_start=inside(0, 1), beta_end=inside(0, 1))
    # latent diffusion's unconditional recipes use 0.0015 and 0.0195
    def __init__(self, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        first, last = beta_range(steps, beta_start, beta_end)
        super().__init__(torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2)


class DDPMCosine(Table):
    """N steps of alpha^2 = cos^2((t + offset) / (1 + offset) pi/2) / cos^2(a0) (arXiv:2102.09672).

    The last betas are capped at max_beta, so some signal is left at t = 1: at N = 1000 alpha is
    4.9e-5. Nothing is scaled with N.
    """

    @ranges(steps=whole(1), offset=at_least(0).as_in(0.008), max_beta=inside(0, 1))
    def __init__(self, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999):
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        angle = (t + offset) / (1 + offset) * (math.pi / 2)
        here, there = angle[:-1], angle[1:]
        # 1 - cos^2(there) / cos^2(here) would cancel
        betas = (there - here).sin() * (there + here).sin() / here.cos() ** 2
        super().__init__(betas.clamp(max=max_beta))


def beta_range(steps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """The first and last beta of a table of N, from the values for a table of 1000."""
    if beta_start > beta_end:
        raise ValueError(f"beta_start={beta_start} must be at most beta_end={beta_end}")
    fewest = math.floor(round(1000 * beta_end, 9)) + 1
    if steps < fewest:
        raise ValueError(
            f"steps={steps} is too few for beta_end={beta_end}, which is defined for "
            f"1000 steps: {steps} steps would need a beta of {beta_end * 1000 / steps:.4g}; use "
            f"{fewest} or more, or a smaller beta_end"
        )
    return beta_start * (1000 / steps), beta_end * (1000 / steps)
