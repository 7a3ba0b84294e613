"""Solves the probability-flow ODE to a tolerance, each sample with its own steps.

With x = scale z, scale^2 = alpha^2 + sigma^2, and the angle atan(sigma / alpha) in (0, pi / 2], the
ODE is dz = (cos eps - sin x0) d(angle) under every schedule: smooth, and with no singular end.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.images import NotDrawn
from diffusion_lab.common.ranges import Positive, settings, whole
from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, jump, noise_of
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.time_grid import EVEN_LOGSNR, TimeGrid
from diffusion_lab.diffusion.schedule import NoiseSchedule

# Dormand and Prince's pair of orders 5 and 4 (J. Comp. Appl. Math. 6, 1980)
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the result of order 5
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST_RATIO = 1e-3  # sigma / alpha that stands for clean data: a 16th of a grey level


class ToleranceError(NotDrawn):
    """A tolerance was not met in the allowed number of steps."""


def integrate(
    slope: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    tolerance: float,
    steps: int,
    longest_first: float = math.inf,
    alone: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields y (B, ...) and its place s (B,) float64 after each step of dy/ds = slope(y, s).

    A sample's error in a step, a root mean square, is kept below tolerance (1 + |y|), and that of
    each of its last `alone` numbers by itself. The first step is a 20th of the way, or
    `longest_first` if that is shorter: an error estimate does not see what a step jumps over.
    Raises ToleranceError if `steps` steps, refused ones among them, do not lead to `end`.
    """
    s = torch.full((len(y),), start, dtype=torch.float64)
    first_length = min(abs(end - start) / 20, longest_first)
    length = torch.full_like(s, math.copysign(first_length, end - start))
    first = slope(y, s)
    for _ in range(steps):
        left = end - s
        last = length.abs() >= left.abs()
        length = torch.where(last, left, length)
        slopes = [first]
        for node, weights in zip(NODES, STAGES, strict=True):
            weighted = sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
            trial = y + broadcast(length, y) * weighted
            slopes.append(slope(trial, s + node * length))
        error = broadcast(length, y) * sum(w * k for w, k in zip(ERROR, slopes, strict=True) if w)
        bound = tolerance * (1 + torch.maximum(y.abs(), trial.abs()))
        size = size_of((error / bound).flatten(1).double(), alone).cpu()
        accepted = size <= 1
        y = torch.where(broadcast(accepted, y).bool(), trial, y)
        first = torch.where(broadcast(accepted, y).bool(), slopes[-1], first)
        s = torch.where(accepted, torch.where(last, end, s + length), s)
        length = length * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
        yield y, s
        if (s == end).all():
            return
    raise ToleranceError(
        f"the ODE needs more than {steps} steps for a tolerance of {tolerance}; raise one of them"
    )


def size_of(error: Tensor, alone: int) -> Tensor:
    """The size (B,) of errors (B, D): the largest of their root mean square and the last ones."""
    together = error[:, : error.shape[1] - alone].square().mean(1, keepdim=True).sqrt()
    return torch.cat([together, error[:, error.shape[1] - alone :].abs()], 1).amax(1)


def angle_of(level: NoiseLevel) -> float:
    """atan(sigma / alpha) of a scalar level, in [0, pi / 2]."""
    return math.atan2(level.sigma.item(), level.alpha.item())


def end_angles(schedule: NoiseSchedule) -> tuple[float, float]:
    """The angles of clean data, the schedule's cleanest or just above 0, and of noise."""
    cleanest, noisy = (angle_of(schedule(torch.tensor(t))) for t in (0.0, 1.0))
    return max(cleanest, math.atan(SMALLEST_RATIO)), noisy


def at_angle(angle: Tensor, schedule: NoiseSchedule) -> tuple[NoiseLevel, Tensor]:
    """The schedule's levels at these angles (B,), and the scale of x there (B,) float64."""
    level = schedule.at_logsnr(-2 * angle.tan().log())
    return level, (level.alpha**2 + level.sigma**2).sqrt()


def angular_slope(
    denoise: DenoiseFn, schedule: NoiseSchedule
) -> Callable[[Tensor, Tensor], Tensor]:
    """dz / d(angle) at z (B, ...) and angles (B,)."""

    def slope(z: Tensor, angle: Tensor) -> Tensor:
        level, scale = at_angle(angle, schedule)
        x = broadcast(scale, z) * z
        x0 = denoise(x, level).x0
        eps = noise_of(x, x0, level)
        return broadcast(level.alpha / scale, z) * eps - broadcast(level.sigma / scale, z) * x0

    return slope


def encode(
    denoise: DenoiseFn, x0: Tensor, schedule: NoiseSchedule, tolerance: float, steps: int
) -> Tensor:
    """The unit noise (B, ...) from which the ODE leads to the clean images x0 (B, ...)."""
    clean, noisy = end_angles(schedule)
    z = x0 * math.cos(clean)
    slope = angular_slope(denoise, schedule)
    # near clean data the slope changes within an angle as small as the first
    for state, _ in integrate(slope, z, clean, noisy, tolerance, steps, clean):
        z = state
    return z / math.sin(noisy)


@settings
class AdaptiveRungeKutta(Sampler):
    """Dormand and Prince's method of order 5 on the probability-flow ODE.

    `tolerance` is the error allowed in a step, relative to 1 + |x|, and `steps` the most steps that
    may be tried; each accepted or refused one costs six network calls. Only the ends of the time
    grid are used: from its first level to its last noisy one, and from there a step to clean data.
    Self-conditioning and guidance with momentum make the slope depend on the call before, refused
    ones too, which costs steps.
    """

    adaptive = True

    steps: Annotated[int, whole(2).as_in(200)] = 200
    time_grid: TimeGrid = EVEN_LOGSNR
    tolerance: Positive = 1e-3

    def walk(self, denoise, x, levels, schedule, randn_like):
        ends_clean = bool(levels.sigma[-1] == 0)
        start, end = levels[0], levels[-2 if ends_clean else -1]
        z = x / math.hypot(start.alpha, start.sigma)
        if angle_of(start) != angle_of(end):
            slope = angular_slope(denoise, schedule)
            ends = angle_of(start), angle_of(end)
            for there, angle in integrate(slope, z, *ends, self.tolerance, self.steps):
                z = there
                yield z * broadcast(at_angle(angle, schedule)[1], z)
        x = z * math.hypot(end.alpha, end.sigma)
        if ends_clean:
            yield jump(x, denoise(x, end).x0, end, levels[-1])
