"""Time samplers: the noise levels of a training batch, as quantiles of a distribution of t."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import flag, ranges
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule import NoiseSchedule

DENSITY_POINTS, DENSITY_WIDTH = 100_000, 0.005

Gather = Callable[[Tensor], Tensor]  # one rank's values (n,) -> the values of all ranks, in order


@dataclass(frozen=True)
class BatchShare:
    """The share of a batch that a call draws: number `index` of `count` of equal size.

    `gather` collects the losses of the other processes.
    """

    index: int = 0
    count: int = 1
    gather: Gather | None = None


WHOLE_BATCH = BatchShare()


class TimeSampler(nn.Module, ABC):
    """Draws noise levels with sigma > 0, from the table where the schedule is discrete.

    A stratified batch of n has one sample in each n-th of the distribution, in random order: the
    same distribution, and a less noisy mean loss.
    """

    @ranges(stratified=flag())
    def __init__(self, stratified: bool = False):
        super().__init__()
        self.stratified = stratified

    @abstractmethod
    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The t below which a share u in (0, 1] of all draws lies, (n,) float64."""

    def importance(self, t: Tensor) -> Tensor:
        """The weight of a loss at t (n,) in the mean, (n,) float32."""
        return torch.ones_like(t, dtype=torch.float32)

    def observe(self, t: Tensor, losses: Tensor, gather: Gather | None = None) -> None:
        """Records the losses (n,) at t (n,); `gather` collects the losses of other processes."""

    def density(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The density of draws at t (n,) in (0, 1], (n,) float64; uniform draws have 1.

        It is the share of draws within 0.005 of t, divided by the part of (0, 1] that this is.
        """
        # in the middle of each of many equal shares of the draws
        u = (torch.arange(DENSITY_POINTS, dtype=torch.float64) + 0.5) / DENSITY_POINTS
        drawn = self.quantile(u, schedule).sort().values.cpu()
        ends = torch.stack([t - DENSITY_WIDTH, t + DENSITY_WIDTH]).double().clamp(0, 1)  # (2, n)
        below = torch.searchsorted(drawn, ends, right=True) / DENSITY_POINTS
        return below.diff(dim=0)[0].double() / ends.diff(dim=0)[0]

    def forward(
        self,
        n: int,
        schedule: NoiseSchedule,
        generator: torch.Generator | None = None,
        share: BatchShare = WHOLE_BATCH,
    ) -> tuple[NoiseLevel, Tensor]:
        """Draws n levels (n,) and their importance weights (n,) float32, on the generator's device.

        Without a generator the device is the CPU; a sampler with buffers returns tensors on theirs.
        The mean loss is the mean of loss x importance. Stratification is over the entire batch,
        even if it is drawn in several shares.
        """
        device = generator.device if generator else "cpu"
        # (0, 1]: at t = 0 there may be no noise to predict
        u = 1 - torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        if self.stratified:
            # random order: the images of a batch may come in a fixed one
            order = torch.randperm(n, generator=generator, device=device)
            u = (order + (share.index + u) / share.count) / n
        t = self.quantile(u, schedule)
        # for t as drawn, whose density it undoes exactly: the weighted mean is then the mean over
        # rounded uniform draws, even if the density changes between two points of the table
        importance = self.importance(t)
        if schedule.discrete_steps is not None:
            t = (t * schedule.discrete_steps).ceil().clamp(min=1) / schedule.discrete_steps
        return schedule(t), importance
