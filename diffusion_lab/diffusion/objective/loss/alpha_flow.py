"""alpha-Flow: MeanFlow's jumps, learned from finite steps that become shorter during training.

A jump should end where its first share alpha, which goes straight to the clean sample, and a jump
for the rest do. alpha = 1 is flow matching of whole jumps, and the limit of alpha = 0 is MeanFlow.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Positive, settings, whole
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import (
    Losses,
    Parts,
    adaptive,
    mean_square,
    same_dropout,
)
from diffusion_lab.diffusion.objective.loss.mean_flow import MeanFlow

ROUNDED = 0.005  # difference of alpha from 0 or 1 that counts as none


@settings
class AlphaFlow(MeanFlow):
    """The error of a jump to its first share alpha and a jump for the rest (arXiv:2510.20771).

    alpha falls along a sigmoid from 1, before `start_images` training images, to 0, after
    `end_images`; `steepness` is the sigmoid's. The other settings are MeanFlow's, and so is the
    loss where alpha is 0. The squared error is divided by alpha, as it shrinks with its square.
    """

    start_images: Annotated[int, whole(0)] = 0
    end_images: Count = 1_280_000
    steepness: Positive = 25.0

    def __post_init__(self) -> None:
        if self.end_images <= self.start_images:
            raise ValueError(
                f"end_images={self.end_images} must be above start_images={self.start_images}"
            )

    def alpha(self, images_seen: int) -> float:
        """The share, in [0, 1], after so many training images."""
        span = self.end_images - self.start_images
        progress = (images_seen - self.start_images) / span - 0.5
        share = (1 - math.tanh(self.steepness * progress / 2)) / 2
        nearest = round(share)
        return nearest if abs(share - nearest) < ROUNDED else share

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        alpha = self.alpha(parts.images_seen)
        if alpha == 0:
            return super().__call__(parts, denoiser, x0, eps, level, given, generator)
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)
        if self.guidance != 1:
            x0 = self.guided(denoiser, x, x0, here, given)
        if alpha < 1:
            x0 = halted(parts, denoiser, alpha, x, x0, here, there, given)
        output = denoiser(x, here.towards(there), given).output
        error = output - parts.prediction.target(x0, noise_of(x, x0, here), here)
        share = torch.where(here.t == there.t, 1.0, alpha).to(error)
        squares = mean_square(error) / share**2
        return Losses(share * adaptive(squares, self.power, self.floor), here)


@torch.no_grad()
def halted(
    parts: Parts,
    denoiser: ConditionalDenoiser,
    alpha: float,
    x: Tensor,
    x0: Tensor,
    here: NoiseLevel,
    there: NoiseLevel,
    given: Given,
) -> Tensor:
    """The x0 (B, C, H, W) with which one jump ends where the two do, the first towards x0."""
    middle = parts.schedule(here.t + alpha * (there.t - here.t))
    with same_dropout(x):
        further = denoiser(jump(x, x0, here, middle), middle.towards(there), given).x0
    # both jumps are linear in their x0, so the whole one's is a mean of the two
    whole, rest = share_of_x0(here, there), share_of_x0(middle, there)
    weight = torch.where(whole == 0, 0, rest / whole)
    return torch.lerp(x0, further, broadcast(weight, x))


def share_of_x0(here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """The derivative (B,) of a jump's end with respect to its x0."""
    return there.alpha - there.sigma / here.sigma * here.alpha
