"""Time samplers that draw from one distribution throughout training."""

import math

import torch
from torch import Tensor

from diffusion_lab.common.ranges import above, between, number, ranges
from diffusion_lab.diffusion.objective.time_sampler.base import TimeSampler
from diffusion_lab.diffusion.schedule import NoiseSchedule

BISECTIONS = 50  # halvings of (0, 1]: t is exact to float64's rounding


class UniformTime(TimeSampler):
    """t uniform on (0, 1] (arXiv:2006.11239)."""

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return u


class LogitNormal(TimeSampler):
    """log(t / (1 - t)) normal (arXiv:2403.03206), but t uniform on (0, 1] in a share of the draws.

    `uniform` in [0, 1] is that share. Without it hardly any draw is close to 0 or 1: of the
    standard distribution 1.4 % are below 0.1, and 0.005 % below 0.02.
    """

    @ranges(mean=number(), std=above(0), uniform=between(0, 1))
    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        uniform: float = 0.0,
        stratified: bool = False,
    ):
        super().__init__(stratified)
        self.mean, self.std, self.uniform = mean, std, uniform

    def share_below(self, t: Tensor) -> Tensor:
        """The share of draws below t (n,) in (0, 1), of its shape and dtype."""
        normal = torch.special.ndtr((torch.logit(t) - self.mean) / self.std)
        return torch.lerp(normal, t, self.uniform)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        if not self.uniform:
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            beyond = self.share_below(middle) < u
            low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
        return high


class LogNormal(TimeSampler):
    """log(sigma / alpha) normal, EDM's P_mean and P_std (arXiv:2206.00364).

    Draws beyond the schedule's ends are put on them.
    """

    @ranges(mean=number(), std=above(0))
    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = False):
        super().__init__(stratified)
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        log_ratio = self.mean + self.std * torch.special.ndtri(u)
        return schedule.at_logsnr(-2 * log_ratio).t


class CosineInterpolated(TimeSampler):
    """logSNR between two cosine schedules shifted to noise resolutions (arXiv:2301.11093).

    At `noise_low` = `noise_high` = 1 it is the cosine schedule cut to [logsnr_min, logsnr_max]. A
    lower `noise_low` adds noise at the noisy end: as much at that share of the image's resolution
    as the cosine schedule has at the full one. `noise_high` does so at the clean end.
    """

    @ranges(noise_low=above(0), noise_high=above(0), logsnr_min=number(), logsnr_max=number())
    def __init__(
        self,
        noise_low: float = 1.0,
        noise_high: float = 1.0,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
        stratified: bool = False,
    ):
        super().__init__(stratified)
        if noise_low > noise_high:
            raise ValueError(f"noise_low={noise_low} must be at most noise_high={noise_high}")
        if not logsnr_min < logsnr_max:
            raise ValueError(f"logsnr_min={logsnr_min} must be below logsnr_max={logsnr_max}")
        self.shifts = 2 * math.log(noise_low), 2 * math.log(noise_high)
        self.logsnr_min, self.logsnr_max = logsnr_min, logsnr_max

    def cosine(self, u: Tensor, shift: float) -> Tensor:
        """logSNR at a share u of the way from the clean end of the shifted cosine schedule."""
        clean, noisy = (
            math.atan(math.exp((shift - end) / 2)) for end in (self.logsnr_max, self.logsnr_min)
        )
        return shift - 2 * (clean + u * (noisy - clean)).tan().log()

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        low, high = (self.cosine(u, shift) for shift in self.shifts)
        return schedule.at_logsnr(torch.lerp(high, low, u)).t
