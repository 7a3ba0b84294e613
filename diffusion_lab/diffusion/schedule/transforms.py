"""Schedules made from another one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.common.ranges import above, ranges
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule.base import NoiseSchedule

# for each path, the function of alpha and sigma that is 1 along it
PATHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight": torch.add,
    "exploding": lambda alpha, sigma: alpha,
    "preserving": torch.hypot,
}


def follows(schedule: NoiseSchedule, path: str) -> bool:
    """Whether the middle of a schedule lies on this path."""
    middle = schedule(torch.tensor(0.5))
    return abs(PATHS[path](middle.alpha, middle.sigma).item() - 1) < 1e-9


class ZeroTerminalSNR(NoiseSchedule):
    """alpha shifted and stretched to reach exactly 0 at t = 1 (arXiv:2305.08891, algorithm 1).

    alpha' = (alpha - alpha(1)) / (1 - alpha(1)); eps prediction becomes impossible.
    """

    def __init__(self, schedule: NoiseSchedule):
        if not follows(schedule, "preserving"):
            raise ValueError(
                "schedule must be variance-preserving (alpha^2 + sigma^2 = 1), such as ddpm_linear "
                "or cosine"
            )
        self.schedule = schedule
        self.discrete_steps = schedule.discrete_steps
        self.terminal = schedule(torch.tensor(1.0)).alpha.item()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        kept = 1 - self.terminal
        noise = sigma**2 / ((1 + alpha) * kept)  # 1 - alpha', without the difference
        alpha = (alpha - self.terminal) / kept
        # exp may round differently in a vector than alone, and then t = 1 would just miss 0
        end = t == 1
        sigma = (noise * (1 + alpha)).sqrt().masked_fill(end, 1.0)
        return alpha.masked_fill(end, 0.0), sigma

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        logsnr = logsnr.double()
        alpha = logsnr.sigmoid().sqrt()
        noise = (-logsnr).sigmoid() / (1 + alpha) * (1 - self.terminal)  # 1 - inner alpha
        inner = self.terminal + (1 - self.terminal) * alpha
        t = self.schedule.at_logsnr(2 * inner.log() - (noise * (1 + inner)).log()).t
        return self(t.masked_fill(alpha == 0, 1.0))


class Shifted(NoiseSchedule):
    """sigma / alpha times `shift`, on the same path: more noise for larger images.

    logSNR falls by 2 log(shift) everywhere (arXiv:2301.11093). On the straight path this is
    t' = shift t / (1 + (shift - 1) t) (arXiv:2403.03206).
    """

    @ranges(shift=above(0))
    def __init__(self, schedule: NoiseSchedule, shift: float = 3.0):
        paths = [length for name, length in PATHS.items() if follows(schedule, name)]
        if not paths:
            raise ValueError(
                "schedule must have alpha + sigma = 1, alpha^2 + sigma^2 = 1 or alpha = 1, such as "
                "rectified, cosine or edm"
            )
        self.schedule = schedule
        self.discrete_steps = schedule.discrete_steps
        self.shift = shift
        self.length = paths[0]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        sigma = self.shift * sigma
        length = self.length(alpha, sigma)
        return alpha / length, sigma / length

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(self.schedule.at_logsnr(logsnr.double() + 2 * math.log(self.shift)).t)
