"""Single-step samplers: left-point, midpoint and trapezoid rules, and ancestral sampling.

Those for models that draw a sample in one to four network calls come last, and restarts.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Fraction, Positive, Range, at_least, one_of, settings
from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, jump, lowered, renoise
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.schedule import NoiseSchedule

Variance = Annotated[str, one_of("fixed_small", "fixed_large", "learned")]
UNLIMITED = Range("at least 0, or inf", lambda v: v == math.inf or at_least(0).allows(v))
MAX_RAISE = math.sqrt(2) - 1  # no more new noise in a step than there is already


@settings
class Euler(Sampler):
    """The left-point rule, of first order; under every schedule DDIM at eta = 0 (arXiv:2010.02502).

    With alpha = 1 - t it is Euler's method for rectified flow, and with alpha = 1 EDM's.
    """

    steps: Count = 50

    one_jump = True

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x = denoise(x, here).jump(x, here, there)
            yield x


def trapezoid(denoise: DenoiseFn, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """Moves x (B, ...) from `here` to `there` by the trapezoid rule, in two network calls.

    To clean data it is the left-point rule, in one call.
    """
    x0 = denoise(x, here).x0
    if there.sigma > 0:  # eps is 0/0 on clean data
        end = denoise(jump(x, x0, here, there), there).x0
        # Averaging x0 and eps over both ends, with eps = (x - alpha x0) / sigma, leaves x
        # with the coefficient that it has in jump, and the two x0 with these shares of it.
        x0 = x0 + here.sigma / (2 * there.sigma) * (end - x0)
    return jump(x, x0, here, there)


@settings
class Heun(Sampler):
    """The trapezoid rule, of second order, 2 steps - 1 network calls; EDM's where alpha = 1.

    arXiv:2206.00364, algorithm 2; with alpha = 1 - t and no churn it is Heun's method for rectified
    flow. `churn` above 0 first raises sigma / alpha by its share of a step, churn / steps, while it
    is in [churn_min, churn_max]; the noise for that has standard deviation `noise_scale`. Beyond
    the schedule's noisiest level there is nothing to raise to, so its first step has no churn.
    """

    steps: Count = 18

    churn: Annotated[float, at_least(0)] = 0.0
    churn_min: Annotated[float, at_least(0)] = 0.0
    churn_max: Annotated[float, UNLIMITED] = math.inf
    noise_scale: Positive = 1.0

    def __post_init__(self) -> None:
        low, high = self.churn_min, self.churn_max
        if not low <= high:
            raise ValueError(f"churn_min={low} must be at most churn_max={high}")

    def walk(self, denoise, x, levels, schedule, randn_like):
        gamma = min(self.churn / self.steps, MAX_RAISE)
        for here, there in pairwise(levels):
            ratio = here.sigma / here.alpha
            # from pure noise no level is noisier, and renoise divides by alpha
            if gamma > 0 and here.alpha > 0 and self.churn_min <= ratio <= self.churn_max:
                raised = schedule.at_logsnr(here.logsnr - 2 * math.log1p(gamma))
                x = renoise(x, here, raised, self.noise_scale * randn_like(x))
                here = raised
            x = trapezoid(denoise, x, here, there)
            yield x


def ancestral_step(
    x: Tensor,
    estimate: Estimate,
    here: NoiseLevel,
    there: NoiseLevel,
    randn_like: Callable[[Tensor], Tensor],
    eta: float,
    variance: str = "fixed_small",
) -> Tensor:
    """x (B, ...) at `there`: the posterior's mean, and fresh noise unless that is clean data.

    The learned variance lies between the logs of the small and the large one, at
    estimate.log_variance_weight in [0, 1] (arXiv:2102.09672, equation 15).
    """
    weight = estimate.log_variance_weight if variance == "learned" else None
    if variance == "learned" and weight is None:
        raise ValueError("variance=learned needs a model that learned its reverse variance")
    left, small, large = lowered(here, there, eta)
    x = estimate.jump(x, here, left)
    if eta == 0 or there.sigma == 0:
        return x
    if weight is not None:
        added = small * (large / small) ** weight
    else:
        added = small if variance == "fixed_small" else large
    return x + added.sqrt() * randn_like(x)


@settings
class Ancestral(Sampler):
    """DDPM at eta = 1 (arXiv:2006.11239), DDIM at eta = 0, and all between (arXiv:2010.02502).

    `variance` is the variance of the fresh noise, times eta^2: fixed_small takes the posterior's;
    fixed_large the forward step's, for about as many steps as in training; and learned the
    network's, which lies between the two (improved DDPM).
    """

    steps: Count = 250

    one_jump = True

    eta: Fraction = 1.0
    variance: Variance = "fixed_small"

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            estimate = denoise(x, here)
            x = ancestral_step(x, estimate, here, there, randn_like, self.eta, self.variance)
            yield x


@settings
class AncestralDPMSolver(Sampler):
    """DPM-Solver++(2S) to a lower level, then fresh noise: k-diffusion's DPM++ 2S ancestral.

    A step jumps with the x0 of its middle in logSNR (arXiv:2211.01095), a second network call, and
    is of second order at eta = 0; eta is that of `Ancestral`. The middle of a step from pure noise,
    whose logSNR is infinite, is where alpha / sigma is half of its end's. A step to no noise of its
    own, as every one to clean data is, takes the first x0, and one network call.
    """

    steps: Count = 20

    eta: Fraction = 1.0

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            left, *_ = lowered(here, there, self.eta)
            x0 = denoise(x, here).x0
            if left.sigma > 0:
                low = here.logsnr if here.alpha > 0 else left.logsnr - 4 * math.log(2)
                middle = schedule.at_logsnr((low + left.logsnr) / 2)
                x0 = denoise(jump(x, x0, here, middle), middle).x0
            x = ancestral_step(x, Estimate(x0), here, there, randn_like, self.eta)
            yield x


@settings
class FlowMap(Sampler):
    """Jumps along the exact path from each level of the grid to the next, one call a jump.

    For models that are told where a jump goes (arXiv:2410.12557, 2505.13447).
    """

    steps: Count = 2

    jumps = True

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x = jump(x, denoise(x, here.towards(there)).x0, here, there)
            yield x


@settings
class FewStep(Sampler):
    """Jumps to clean data from each level of the grid, and back to the next with fresh noise.

    Multistep consistency sampling (arXiv:2303.01469, algorithm 1).
    """

    steps: Count = 2

    needs_consistency = True

    def walk(self, denoise, x, levels, schedule, randn_like):
        clean = levels[-1]
        for here, there in pairwise(levels):
            x0 = denoise(x, here.towards(clean)).x0
            x = add_noise(x0, randn_like(x0), there) if there.sigma > 0 else there.alpha * x0
            yield x


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
    """Heun's method, which at some levels goes back to more noise: restarts (arXiv:2306.14878).

    Each of `restarts` is (low, high, steps, times): when the walk is at the level of the grid that
    is nearest to sigma / alpha = low, fresh noise takes it to high, and Heun's method back in
    `steps` steps, and so on `times` times. `noise_scale` is the standard deviation of that noise.
    Network calls: 2 (steps + the sum of their steps x times) - 1. The authors' N_restart, which
    counts levels, is one more than the steps here.
    """

    steps: Count = 18

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
