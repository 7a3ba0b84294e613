"""Time grids: the levels that a sampler visits, from noise to exactly clean data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Positive, at_least, numbers, ranges, settings
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule import NoiseSchedule

TIMES = numbers(
    "a decreasing list of times from at most 1 to above 0 (the clean end 0 is added)",
    lambda value: max(value, default=2) <= 1 and all(a > b for a, b in pairwise([*value, 0])),
).as_in([1.0, 0.5])


class TimeGrid(ABC):
    """The times at which a sampler evaluates the network."""

    needs_table = False  # whether the grid counts the points of a discrete schedule

    @abstractmethod
    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """The t of each evaluation, falling: (steps,) float64 in (0, 1]."""

    def __call__(self, schedule: NoiseSchedule, steps: int) -> NoiseLevel:
        """steps + 1 levels from noise to data; the last is sigma = 0, whatever the schedule."""
        noisy = schedule(self.times(schedule, steps))
        zero, one = noisy.t.new_zeros(1), noisy.t.new_ones(1)
        return noisy.then(NoiseLevel(zero, one, zero))


@settings
class UniformGrid(TimeGrid):
    """t evenly spaced from 1 to 1/steps, or to sigma / alpha = `sigma_min` if that is noisier.

    The last step goes directly from there to clean data. On a table the grid is `Trailing`'s, if
    steps divides its size and the level at 1/steps is at least as noisy as sigma_min.
    """

    sigma_min: Annotated[float, at_least(0)] = 0.0

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        falls = torch.arange(steps, dtype=torch.float64)
        end = 0.0
        if self.sigma_min > 0:
            logsnr = torch.tensor(-2 * math.log(self.sigma_min), dtype=torch.float64)
            end = float(schedule.at_logsnr(logsnr).t)
        if end == 1:
            raise ValueError(
                f"sigma_min={self.sigma_min} must be below the schedule's largest sigma / alpha"
            )
        if steps * end <= 1:
            return 1 - falls / steps
        return 1 - falls * ((1 - end) / (steps - 1))


@settings
class UniformLogSNR(TimeGrid):
    """logSNR uniform between sigma / alpha = sigma_max and sigma_min (arXiv:2206.00927).

    Where the schedule ends before sigma_max or sigma_min, its end is used. The first level is then
    moved to t = 1, so a walk starts on all the noise that the schedule has, infinite sigma / alpha
    included, and crosses what lies above sigma_max in its first step.
    """

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")

    def even(self, ratio: Tensor) -> Tensor:
        """The function of sigma / alpha that the grid divides evenly."""
        return ratio.log()

    def ratio(self, even: Tensor) -> Tensor:
        """Inverts `even`: the sigma / alpha at which it has this value."""
        return even.exp()

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        ends = schedule(torch.tensor([0.0, 1.0]))
        low, high = self.even((ends.sigma / ends.alpha).clamp(self.sigma_min, self.sigma_max))
        places = torch.linspace(0, 1, steps, dtype=torch.float64)
        ratio = self.ratio(torch.lerp(high, low, places))
        t = schedule.at_logsnr(-2 * ratio.log()).t
        t[0] = 1.0
        return t


@settings
class Karras(UniformLogSNR):
    """(sigma / alpha)^(1 / rho) uniform from sigma_max to sigma_min (arXiv:2206.00364, equation 5).

    The ends are treated as by `UniformLogSNR`, to which this grid tends for large rho.
    """

    rho: Positive = 7.0

    def even(self, ratio: Tensor) -> Tensor:
        return ratio ** (1 / self.rho)

    def ratio(self, even: Tensor) -> Tensor:
        return even**self.rho


class Explicit(TimeGrid):
    """An explicit list of times: the t of each evaluation, decreasing, one per step."""

    @ranges(times=TIMES)
    def __init__(self, times: Sequence[float]):
        self.written = list(times)  # Hydra's list has its own type

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        if steps != len(self.written):
            raise ValueError(
                f"steps={steps} must be {len(self.written)}, the number of times in the time grid"
            )
        return torch.tensor(self.written, dtype=torch.float64)


class TableGrid(TimeGrid):
    """Points of a discrete schedule's table."""

    needs_table = True

    @abstractmethod
    def index(self, points: int, steps: int) -> Tensor:
        """The place of each evaluation in a table of `points`, falling to 0, (steps,) float64."""

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        points = schedule.discrete_steps
        if points is None:
            raise ValueError(
                "time_grid needs a schedule with a table, and this one has none; use the uniform "
                "grid, or a discrete schedule such as ddpm_linear"
            )
        if steps > points:
            raise ValueError(
                f"steps={steps} must be at most {points}, the size of the schedule's table, on "
                "this time grid"
            )
        return (self.index(points, steps) + 1) / points


class Leading(TableGrid):
    """Every (N / steps)-th point of a table of N, counted from the cleanest."""

    def index(self, points: int, steps: int) -> Tensor:
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (points // steps)


class Linspace(TableGrid):
    """Evenly spaced points of a table, rounded, the noisiest and the cleanest among them."""

    def index(self, points: int, steps: int) -> Tensor:
        return torch.linspace(points - 1, 0, steps, dtype=torch.float64).round()


class Trailing(TableGrid):
    """Every (N / steps)-th point of a table of N, rounded, counted from the noisiest."""

    def index(self, points: int, steps: int) -> Tensor:
        # rounded like the step of numpy's arange, which decides how halves round in diffusers
        step = points - (points - points / steps)
        return (points - torch.arange(steps, dtype=torch.float64) * step).round() - 1


class Quadratic(TableGrid):
    """Points of a table of N denser towards clean data, up to 0.8 N (arXiv:2010.02502).

    Their indices are squares, rounded down; the cleanest points of a long grid, which would
    coincide, are neighbours instead. A walk starts at 0.8 N on pure noise, as published.
    """

    def index(self, points: int, steps: int) -> Tensor:
        if steps > 0.8 * points:
            raise ValueError(
                f"steps={steps} must be at most {math.floor(0.8 * points)}: the quadratic grid has "
                f"no more points on this schedule's table of {points}"
            )
        end = math.sqrt(0.8 * points)
        order = torch.arange(steps, dtype=torch.float64)
        root = order * (end / max(steps - 1, 1))
        root[-1] = end  # exact: a rounding error below a whole number would be cut to the one below
        return ((root.square().floor() - order).cummax(0).values + order).flip(0)


# the grids of samplers that are given none
EVEN_T, EVEN_LOGSNR, BY_RHO = UniformGrid(sigma_min=0.1), UniformLogSNR(), Karras()
