"""Schedules with a closed form: rectified flow, cosine, variance exploding."""

import math

import torch
from torch import Tensor

from diffusion_lab.noise import NoiseLevel

from .base import NoiseSchedule


class Rectified(NoiseSchedule):
    """The straight path alpha = 1 - t, sigma = t of rectified flow (arXiv:2209.03003).

    At t = 1 alpha is exactly 0, so eps prediction is impossible.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(torch.sigmoid(-logsnr.double() / 2))


class Cosine(NoiseSchedule):
    """Constant-speed walk on alpha^2 + sigma^2 = 1, logSNR from 20 to -20 (arXiv:2202.00512).

    The ends stop short of the axes: at cos(pi/2) = 6e-17 nothing would warn that eps prediction has
    a gain of 1e16. Here it is sigma/alpha = e^10 at t = 1, finite, so eps is allowed; as that still
    multiplies the network's errors by 22026, sample eps models with guidance.clip=1.
    """

    CLEANEST = math.atan(math.exp(-10))  # angle at logSNR 20; its complement is at -20
    RANGE = math.pi / 2 - 2 * CLEANEST

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.CLEANEST + self.RANGE * t
        return angle.cos(), angle.sin()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        angle = (-logsnr.double() / 2).exp().atan()
        return self(((angle - self.CLEANEST) / self.RANGE).clamp(0, 1))


class VarianceExploding(NoiseSchedule):
    """alpha = 1 and sigma geometric in t (arXiv:2011.13456).

    The default range is that of EDM (arXiv:2206.00364), in units of images in [-1, 1].
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"schedule.sigma_min={sigma_min} and schedule.sigma_max={sigma_max} must satisfy "
                "0 < sigma_min < sigma_max"
            )
        self.log_min = math.log(sigma_min)
        self.log_range = math.log(sigma_max / sigma_min)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), (self.log_min + self.log_range * t).exp()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(((-logsnr.double() / 2 - self.log_min) / self.log_range).clamp(0, 1))
