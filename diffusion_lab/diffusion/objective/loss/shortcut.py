"""Shortcut models: one jump should end where two jumps of half its length do."""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Fraction, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import Loss, Losses, Parts, mean_square


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
        before, after = (int(self.share * n) for n in (parts.place, parts.place + len(x0)))
        count = after - before
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
