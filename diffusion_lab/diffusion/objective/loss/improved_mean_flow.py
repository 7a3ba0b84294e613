"""Improved MeanFlow: the network's derivative is along its own velocity, and not a pair's.

The target F* depends on the velocity of the path in two places: in the derivative, where the
network's own is taken, and outside of it, where the pair's is right on average. On the straight
path the loss is |F + (t - s) dF/dt - (eps - x0)|^2, flow matching by what jumps say of a velocity.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Fraction, settings
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump
from diffusion_lab.diffusion.objective.loss.base import (
    Losses,
    Parts,
    adaptive,
    mean_square,
    same_dropout,
)
from diffusion_lab.diffusion.objective.loss.jumps import rates
from diffusion_lab.diffusion.objective.loss.mean_flow import (
    MeanFlow,
    flow_target,
    labelled,
    slope_of_output,
)


@settings
class ImprovedMeanFlow(MeanFlow):
    """|F - F*|^2 by `adaptive`, whose derivative is along F's own path (arXiv:2512.02012).

    Half of the samples do not jump, as F's path must be learned, too. `guidance` above 1 is the
    largest of the scales that are drawn, with a density of 1 / scale. The network is told the scale
    of each sample, and guidance=embedded chooses one.
    """

    instant: Fraction = 0.5

    def __post_init__(self) -> None:
        self.told_scale = self.guidance != 1

    @property
    def extra_passes(self) -> float:
        """The network's own velocity, the derivative, and a call without labels if guided."""
        return 2.0 + self.told_scale

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)
        if self.told_scale:
            given = replace(given, scale=self.scales(denoiser, x, given, generator))
        with torch.no_grad(), same_dropout(x):
            own = denoiser(x, here, given).x0
        if self.told_scale:
            x0 = guided(denoiser, x, x0, own, here, given)
        output, target = flow_target(parts, denoiser, x, own, here, there, given)
        target = target + change_of_target(parts, x0 - own, here, there)
        return Losses(adaptive(mean_square(output - target), self.power, self.floor), here)

    def scales(
        self,
        denoiser: ConditionalDenoiser,
        x: Tensor,
        given: Given,
        generator: torch.Generator | None,
    ) -> Tensor:
        """A scale for each of the samples x, (B,): 1 where the label is dropped."""
        device = generator.device if generator else "cpu"
        drawn = torch.rand(len(x), generator=generator, device=device).to(x.device)
        return torch.where(labelled(denoiser, given, x), (math.log(self.guidance) * drawn).exp(), 1)


def guided(
    denoiser: ConditionalDenoiser,
    x: Tensor,
    x0: Tensor,
    own: Tensor,
    here: NoiseLevel,
    given: Given,
) -> Tensor:
    """The clean samples (B, C, H, W) that the path at x, guided by given.scale, heads for.

    If `own` is the guided estimate weak + scale (strong - weak), x0 + (1 - 1 / scale) (own - weak)
    is so too on average, and has no more variance than x0.
    """
    assert given.scale is not None, "a scale is drawn for each sample"
    with torch.no_grad():
        weak = denoiser(x, here, replace(given, labels=None, scale=None)).x0
    return x0 + broadcast(1 - 1 / given.scale, x) * (own - weak)


def change_of_target(parts: Parts, change: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """The change of F* if the path heads for x0 + change (B, C, H, W), and the derivative stays."""
    d_alpha, d_sigma = rates(parts.schedule, here)
    velocity = broadcast(d_alpha - d_sigma * here.alpha / here.sigma, change) * change
    x0 = parts.prediction.to_x0(torch.zeros_like(velocity), velocity, here)
    slope = slope_of_output(parts.schedule, parts.prediction, here, there)
    return -jump(velocity, x0, here, there) / broadcast(slope, change)
