"""Restart sampling: the ODE, with returns to more noise, which undo errors (arXiv:2306.14878)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch

from diffusion_lab.common.ranges import Count, Positive, Range, settings
from diffusion_lab.diffusion.noise import NoiseLevel, renoise
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.single_step import trapezoid
from diffusion_lab.diffusion.sampler.time_grid import EVEN_T, TimeGrid
from diffusion_lab.diffusion.schedule import NoiseSchedule

RHO = 7  # spacing of the way back, as in EDM's grid


def is_restart(value: Any) -> bool:
    """Whether a value is [low, high, steps, times] with 0 < low < high, the last two whole."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        return False
    low, high, *counts = value
    numbers = all(type(each) in (int, float) for each in (low, high))
    return numbers and 0 < low < high and all(type(n) is int and n > 0 for n in counts)


RESTARTS = Range(
    "a list of restarts, each [low, high, steps, times] with 0 < low < high",
    lambda value: (
        isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_restart, value))
    ),
    example=[[0.06, 0.3, 2, 2]],
)


@settings
class Restart(Sampler):
    """Heun's method, which at some levels goes back to more noise and down again.

    Each of `restarts` is (low, high, steps, times): when the walk is at the level of the grid that
    is nearest to sigma / alpha = low, fresh noise takes it to high, and Heun's method back in
    `steps` steps, and so on `times` times. `noise_scale` is the standard deviation of that noise.
    Network calls: 2 (steps + the sum of their steps x times) - 1. The authors' N_restart, which
    counts levels, is one more than the steps here.
    """

    steps: Count = 18
    time_grid: TimeGrid = EVEN_T

    restarts: Annotated[Sequence[Sequence[float]], RESTARTS] = ((0.06, 0.3, 2, 2),)
    noise_scale: Positive = 1.0

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        levels = super().levels(schedule)
        noisiest = float(levels.sigma[0] / levels.alpha[0])
        for low, high, *_ in self.restarts:
            if high > noisiest:
                raise ValueError(
                    f"restarts up to {high} must end at {noisiest:.4g} at most, the largest "
                    "sigma / alpha of the time grid"
                )
            if place_of(low, high, levels) is None:
                raise ValueError(
                    f"restarts from {low} to {high} need a level of the time grid below {high}; "
                    "write more steps, or a smaller sigma_min of the time grid"
                )
        return levels

    def walk(self, denoise, x, levels, schedule, randn_like):
        ways: dict[int, list[NoiseLevel]] = {}  # by the place where they end
        for low, high, steps, times in self.restarts:
            # a walk that begins on an image, not on noise, does not go back beyond its beginning
            reachable = high <= levels.sigma[0] / levels.alpha[0]
            if reachable and (place := place_of(low, high, levels)):
                way = way_back(levels[place], high, int(steps), schedule)
                ways.setdefault(place, []).extend([way] * int(times))
        for i, (here, there) in enumerate(pairwise(levels), 1):
            x = trapezoid(denoise, x, here, there)
            for way in ways.get(i, ()):
                x = renoise(x, there, way[0], self.noise_scale * randn_like(x))
                for j in range(len(way) - 1):
                    x = trapezoid(denoise, x, way[j], way[j + 1])
            yield x


def place_of(low: float, high: float, levels: NoiseLevel) -> int | None:
    """The place of the level nearest to sigma / alpha = low: below high, not first and not clean.

    None if there is no such level.
    """
    ratio = levels.sigma / levels.alpha
    gap = (ratio - low).abs().masked_fill((ratio >= high) | (ratio == 0), torch.inf)
    gap[0] = torch.inf
    place = int(gap.argmin())
    return place if gap[place].isfinite() else None


def way_back(low: NoiseLevel, high: float, steps: int, schedule: NoiseSchedule) -> NoiseLevel:
    """The levels (steps + 1,) from sigma / alpha = high to `low`, spaced as EDM's grid."""
    ends = torch.stack([torch.full_like(low.sigma, high), low.sigma / low.alpha]) ** (1 / RHO)
    roots = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return schedule.at_logsnr(-2 * RHO * roots.log())
