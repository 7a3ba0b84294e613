"""Losses of few steps by agreement: of estimates on one path, or of a jump and its two halves."""

import math
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Fraction, Positive, above, at_least, number, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, DenoiseFn, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import (
    TINY,
    Loss,
    Losses,
    Parts,
    adaptive,
    mean_square,
    same_dropout,
)

CLOSEST = 1e-4  # relative difference of levels, of whose estimates float32 keeps three digits


@settings
class Consistency(Loss):
    """The distance of x0_hat to x0_hat at a cleaner level, by easy consistency tuning's schedule.

    arXiv:2406.14548. With u = sigma / alpha, the cleaner level has u (1 - n(u) / q^(stage + 1)), or
    0 if that is less, where n(u) = 1 + k sigmoid(-b u), k = `steepness` and b = `slope`. A stage is
    `stage_images` training images long, so the two levels come closer, until 1 / q^(stage + 1) is
    1e-4. The distance is divided by the difference of u.
    """

    of_samples = True

    q: Annotated[float, above(1)] = 2.0
    stage_images: Count = 1_280_000
    steepness: Annotated[float, at_least(0)] = 8.0
    slope: Positive = 1.0

    extra_passes = 1.0  # at the cleaner level

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        cleaner, gap = self.cleaner(parts, level)
        # first, so that its memory is free before the graph is built
        with torch.no_grad(), same_dropout(x0):
            before = denoiser(add_noise(x0, eps, cleaner), cleaner, given).x0
        # at clean data x0_hat is x0 itself, which no network needs to be asked for
        target = torch.where(broadcast(gap == 1, x0).bool(), x0, before)
        error = denoiser(add_noise(x0, eps, level), level, given).x0 - target
        ratio = (level.sigma / level.alpha * gap).to(error.dtype)
        return Losses(adaptive(mean_square(error), 0.5, TINY) / ratio, level)

    def cleaner(self, parts: Parts, level: NoiseLevel) -> tuple[NoiseLevel, Tensor]:
        """The cleaner level of each pair, and by which share of u it is cleaner, both (B,)."""
        u = level.sigma / level.alpha
        stage = parts.images_seen // self.stage_images
        closeness = max(self.q ** -(stage + 1), CLOSEST)
        share = (1 + self.steepness * torch.sigmoid(-self.slope * u)) * closeness
        share = share.clamp(max=1)
        # the network is asked at a visible level even where its answer is not used
        kept = torch.where(share == 1, 0.5, 1 - share)
        return parts.schedule.at_logsnr(level.logsnr - 2 * kept.log()), share


@settings
class Distillation(Loss):
    """The distance of x0_hat to x0_hat after the teacher's step of Heun (arXiv:2303.01469).

    The step goes from u = sigma / alpha to u (1 - gap). The distance is divided by u gap, and the
    x0_hat after the step is made with the weights in training: the paper weighs all levels equally
    and takes an average of the weights.
    """

    of_samples = asks_teacher = True

    gap: Annotated[float, number("between 0 and 1", lambda value: 0 < value < 1)] = 0.15

    extra_passes = 1.0  # after the step; the teacher's calls are not the network's

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        x, ratio = add_noise(x0, eps, level), level.sigma / level.alpha
        cleaner = parts.schedule.at_logsnr(level.logsnr - 2 * math.log(1 - self.gap))
        with torch.no_grad():
            moved = heun(parts.teacher.bound(given.labels), x, level, cleaner)
            with same_dropout(x):
                target = denoiser(moved, cleaner, given).x0
        error = denoiser(x, level, given).x0 - target
        losses = adaptive(mean_square(error), 0.5, TINY) / (self.gap * ratio).to(error.dtype)
        return Losses(losses, level)


def heun(denoise: DenoiseFn, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """One step of Heun's method from `here` to `there`, for x (B, ...) and levels (B,)."""
    first = denoise(x, here).x0
    guess = jump(x, first, here, there)
    second = denoise(guess, there).x0
    signal = broadcast(there.alpha - here.alpha, x) * (first + second)
    noise = noise_of(x, first, here) + noise_of(guess, second, there)
    return x + (signal + broadcast(there.sigma - here.sigma, x) * noise) / 2


@settings
class Shortcut(Loss):
    """The denoising loss, and for a share of the samples the error to two half jumps.

    Jumps are 1, 1/2, 1/4, ... of [0, 1] long in t, and start at a multiple of their length
    (arXiv:2410.12557). The shortest of them are 2 / `finest` long; their halves are Euler steps
    with the denoised estimate. The half jumps have no gradient; unlike the paper's they are made
    with the weights in training, not with their average. The share is exact over training, however
    a batch is divided.
    """

    share: Fraction = 0.25
    finest: Count = 128

    two_levels = True

    rules: ClassVar[Rules] = {
        ".share={loss.share} trains jumps alone, or none; write a number above 0 and below 1": (
            lambda loss: not 0 < loss.share < 1
        ),
    }

    def __post_init__(self) -> None:
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise ValueError(f"finest={self.finest} must be a power of 2, such as 128")

    @property
    def extra_passes(self) -> float:
        """The two half jumps of a share of the samples."""
        return 2 * self.share

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        count = parts.count(self.share, len(x0))
        here = there = level
        if self.share:
            # sharded weights need as many calls of each rank, so one sample is tried at least
            tried = max(count, 1)
            jumps = self.jumps(parts, tried, level, generator)
            x = add_noise(x0[:tried], eps[:tried], jumps[0])
            target = self.halves(parts, denoiser, x, jumps, given[:tried])
            noise = noise_of(x, target, jumps[0])
            x0, eps = (
                torch.cat([new[:count], old[count:]]) for new, old in ((target, x0), (noise, eps))
            )
            here, there = (
                parts.schedule(torch.cat([new.t[:count], level.t[count:]]))
                for new in (jumps[0], jumps[2])
            )
        output = denoiser(add_noise(x0, eps, here), here.towards(there), given).output
        return Losses(mean_square(output - parts.prediction.target(x0, eps, here)), here)

    def jumps(
        self, parts: Parts, count: int, level: NoiseLevel, generator: torch.Generator | None
    ) -> tuple[NoiseLevel, NoiseLevel, NoiseLevel]:
        """Start, middle and end, each (count,), of random jumps."""
        device = generator.device if generator else "cpu"
        draw = torch.rand(2, count, generator=generator, device=device, dtype=torch.float64)
        finest = self.finest.bit_length() - 1
        pieces = 2.0 ** (draw[0] * finest).floor()  # 1, 2, 4, ..., finest / 2
        start = ((draw[1] * pieces).floor() + 1) / pieces
        times = (start, start - 0.5 / pieces, start - 1 / pieces)
        here, middle, there = (parts.schedule(t).to(level.t.device) for t in times)
        return here, middle, there

    def trained_for(self, start: Tensor, end: Tensor) -> Tensor:
        """Whether `jumps` draws each of the jumps; an error of 1e-5 counts as rounding."""
        pieces = 1 / (start - end)
        known = 2.0 ** pieces.log2().round()
        place = start * known
        return (
            (known <= self.finest // 2)
            & torch.isclose(pieces, known)
            & torch.isclose(place, place.round())
        )

    @torch.no_grad()
    def halves(
        self,
        parts: Parts,
        denoiser: ConditionalDenoiser,
        x: Tensor,
        levels: tuple[NoiseLevel, NoiseLevel, NoiseLevel],
        given: Given,
    ) -> Tensor:
        """The x0 (B, C, H, W) with which one jump ends where the two half jumps do."""
        here, middle, there = levels
        shortest = here.t - middle.t < 1.5 / self.finest
        end = x
        for a, b in pairwise(levels):
            aim = parts.schedule(torch.where(shortest, a.t, b.t))
            end = jump(end, denoiser(end, a.towards(aim), given).x0, a, b)
        ratio = there.sigma / here.sigma
        share = there.alpha - ratio * here.alpha
        return (end - broadcast(ratio, x) * x) / broadcast(share, x)
