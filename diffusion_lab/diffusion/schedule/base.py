"""Noise schedules: t in [0, 1] -> (alpha, sigma) in x_t = alpha x0 + sigma eps."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.diffusion.noise import NoiseLevel


class NoiseSchedule(ABC):
    """A path from data (t = 0) to noise (t = 1), along which logSNR falls strictly."""

    discrete_steps: int | None = None  # points of the table, where the schedule has one

    @property
    def explodes(self) -> bool:
        """Whether sigma exceeds 1 at t = 1, as on variance-exploding schedules."""
        return bool(self(torch.ones(())).sigma > 1 + 1e-6)

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, a float64 tensor of any shape; both of t's shape."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The levels at t in [0, 1], of t's shape and on its device."""
        t = t.to(torch.float64)  # 1 - alpha^2 cancels in float32
        return NoiseLevel(t, *self.coefficients(t))

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        """The levels of this logSNR, of its shape; beyond the schedule's ends, the nearer end."""
        # bisection to 2^-60: schedules with a closed form override this
        low = torch.zeros_like(logsnr, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(60):
            middle = (low + high) / 2
            too_clean = self(middle).logsnr > logsnr
            low = torch.where(too_clean, middle, low)
            high = torch.where(too_clean, high, middle)
        return self(high)
