"""Consistency distillation: x0_hat is the same before and after one step of a trained model."""

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Range, number, settings
from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import (
    TINY,
    Loss,
    Losses,
    adaptive,
    mean_square,
    same_dropout,
)

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
