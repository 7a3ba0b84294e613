"""Consistency models: x0_hat is the same at two neighbouring levels of one path.

The path is that of a sample and its noise, or, by distillation, one step of a trained model.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Positive, Range, above, at_least, number, settings
from diffusion_lab.diffusion.estimate import DenoiseFn
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


GAP: Range = number("between 0 and 1", lambda value: 0 < value < 1)


@settings
class Distillation(Loss):
    """The distance of x0_hat to x0_hat after the teacher's step of Heun (arXiv:2303.01469).

    The step goes from u = sigma / alpha to u (1 - gap). The distance is divided by u gap, and the
    x0_hat after the step is made with the weights in training: the paper weighs all levels equally
    and takes an average of the weights.
    """

    of_samples = asks_teacher = True

    gap: Annotated[float, GAP] = 0.15

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
