"""Losses whose samples jump from a level to any cleaner one, and the speed of levels on a path."""

from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Fraction, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.objective.loss.base import Loss, Parts
from diffusion_lab.diffusion.schedule import NoiseSchedule


@settings
class Jumps(Loss):
    """A loss of jumps between two draws of the time sampler, from the noisier to the cleaner.

    A share `instant` of the samples does not jump, and trains the denoised estimate.
    """

    instant: Fraction = 0.25

    two_levels = True

    rules: ClassVar[Rules] = {
        ".instant={loss.instant} trains no jumps; write a number below 1, or "
        "objective=flow_matching": lambda loss: loss.instant == 1,
    }

    def ends(
        self, parts: Parts, level: NoiseLevel, generator: torch.Generator | None
    ) -> tuple[NoiseLevel, NoiseLevel]:
        """The start and the end, both (B,), of each sample's jump."""
        other = parts.time_sampler(len(level), parts.schedule, generator)[0].to(level.t.device)
        device = generator.device if generator else "cpu"
        stays = torch.rand(len(level), generator=generator, device=device) < self.instant
        stays = stays.to(level.t.device, non_blocking=True)
        first, second = level.t, torch.where(stays, level.t, other.t)
        return parts.schedule(first.maximum(second)), parts.schedule(first.minimum(second))


def rates(schedule: NoiseSchedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The derivatives of alpha and sigma with respect to t at levels (B,)."""
    return derivative(schedule.coefficients, (level.t,), (torch.ones_like(level.t),))[1]
