"""At which noise levels a network is trained: distributions of t, and their importance weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import above, between, flag, number, ranges, share, whole
from diffusion_lab.common.rules import Rules
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

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        if not self.uniform:
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            normal = torch.special.ndtr((torch.logit(middle) - self.mean) / self.std)
            beyond = torch.lerp(normal, middle, self.uniform) < u  # the share of draws below it
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


class SecondMoment(TimeSampler):
    """Draws more where the loss is large, and undoes this by weights (arXiv:2102.09672).

    Each of `bins` equal parts of (0, 1] gets a share in proportion to the root mean square of its
    last `history` losses; the share `uniform` is spread evenly, as is everything until every part
    has its history.
    """

    rules: ClassVar[Rules] = {
        "learns from losses at the levels that it draws, and jumps have two; write "
        "objective/time_sampler=logit_normal": lambda time_sampler, loss: loss.two_levels,
    }
    warnings: ClassVar[Rules] = {
        "draws evenly until it has losses of each of its bins, and this schedule's table has fewer "
        "levels; write objective.time_sampler.bins={schedule.discrete_steps}": (
            lambda time_sampler, schedule: (
                (schedule.discrete_steps or math.inf) < len(time_sampler.count)
            )
        ),
    }

    @ranges(bins=whole(2), history=whole(1), uniform=share())
    def __init__(
        self,
        bins: int = 100,
        history: int = 10,
        uniform: float = 0.001,
        stratified: bool = False,
    ):
        super().__init__(stratified)
        self.uniform = uniform
        self.history = nn.Buffer(torch.zeros(bins, history))  # a ring for each part
        self.count = nn.Buffer(torch.zeros(bins, dtype=torch.int64))  # losses ever seen

    def probabilities(self) -> Tensor:
        """The share of draws that each part gets, (bins,) float64."""
        bins, history = self.history.shape
        rms = self.history.double().square().mean(1).sqrt()
        learned = (1 - self.uniform) * rms / rms.sum() + self.uniform / bins
        # not a number where all losses are 0, or one is infinite
        known = (self.count >= history).all() & (learned.sum() > 0)
        return torch.where(known, learned, torch.full_like(learned, 1 / bins))

    def part_of(self, t: Tensor) -> Tensor:
        """The index (n,) of the part of (0, 1] in which t (n,) lies."""
        bins = len(self.count)
        # t may be a table's point on the upper edge of its part, give or take a rounding
        return (t * bins - 1e-6).floor().long().clamp(0, bins - 1)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        share = self.probabilities()
        u = u.to(share.device, non_blocking=True)
        index = torch.searchsorted(share.cumsum(0), u).clamp(max=len(share) - 1)
        inside = (u - (share.cumsum(0) - share)[index]) / share[index]
        return (index + inside.clamp(0, 1)) / len(share)

    def importance(self, t: Tensor) -> Tensor:
        share = self.probabilities()
        return (1 / (len(share) * share[self.part_of(t)])).float()

    def observe(self, t: Tensor, losses: Tensor, gather: Gather | None = None) -> None:
        if gather is not None:
            t, losses = gather(t), gather(losses)
        bins, history = self.history.shape
        part = self.part_of(t)
        hits = (part[:, None] == torch.arange(bins, device=part.device)).long()  # (n, bins)
        new = hits.sum(0)
        place = hits.cumsum(0).gather(1, part[:, None])[:, 0] - 1  # among the hits of its part
        slot = (self.count[part] + place) % history
        # losses that this very call would overwrite go to a spare column: a GPU writes in any
        # order, and selecting the others would wait for it
        slot = torch.where(place < new[part] - history, history, slot)
        ring = torch.cat([self.history, torch.zeros_like(self.history[:, :1])], 1)
        ring[part, slot] = losses.to(ring.dtype)
        self.history.copy_(ring[:, :history])
        self.count.add_(new)
