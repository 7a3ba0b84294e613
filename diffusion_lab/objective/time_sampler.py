"""Time samplers: the noise levels of a training batch, as quantiles of a distribution of t."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.noise import NoiseLevel
from diffusion_lab.schedule import NoiseSchedule


class TimeSampler(ABC):
    """Draws noise levels with sigma > 0, from the table where the schedule is discrete.

    A stratified batch of n has one sample in each n-th of the distribution, in random order: the
    same distribution, and a less noisy mean loss.
    """

    def __init__(self, stratified: bool = False):
        self.stratified = stratified

    @abstractmethod
    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The t below which a share u in (0, 1] of all draws lies, (n,) float64."""

    def __call__(
        self, n: int, schedule: NoiseSchedule, generator: torch.Generator | None = None
    ) -> tuple[NoiseLevel, Tensor]:
        """n levels (n,) and their importance weights (n,) float32, on the generator's device.

        Without a generator that is the CPU. The mean loss is that of (loss x importance).
        """
        device = generator.device if generator else "cpu"
        # (0, 1]: at t = 0 there may be no noise to predict
        u = 1 - torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        if self.stratified:
            # random order: the images of a batch may come in a fixed one
            u = (torch.randperm(n, generator=generator, device=device) + u) / n
        t = self.quantile(u, schedule)
        if schedule.discrete_steps is not None:
            t = (t * schedule.discrete_steps).ceil().clamp(min=1) / schedule.discrete_steps
        return schedule(t), torch.ones_like(t, dtype=torch.float32)


class Uniform(TimeSampler):
    """t uniform on (0, 1] (arXiv:2006.11239)."""

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return u


class LogitNormal(TimeSampler):
    """log(t / (1 - t)) normal (arXiv:2403.03206)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False):
        super().__init__(stratified)
        self.mean, self.std = mean, positive_std(std)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class LogNormal(TimeSampler):
    """log(sigma / alpha) normal, EDM's P_mean and P_std (arXiv:2206.00364).

    Draws beyond the schedule's ends are put on them.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = False):
        super().__init__(stratified)
        self.mean, self.std = mean, positive_std(std)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        log_ratio = self.mean + self.std * torch.special.ndtri(u)
        return schedule.at_logsnr(-2 * log_ratio).t


def positive_std(std: float) -> float:
    """std itself, refused unless above 0."""
    if std <= 0:
        raise ValueError(f"objective.time_sampler.std={std} must be above 0")
    return std
