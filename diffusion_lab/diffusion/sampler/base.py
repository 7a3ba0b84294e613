"""Samplers: walks from noise to data that ask only for the denoised estimate.

All integrate dx = x0 d(alpha) + eps d(sigma), which needs no derivative of the schedule.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.sampler.time_grid import EVEN_T, TimeGrid
from diffusion_lab.diffusion.schedule import NoiseSchedule

CLOSEST = 0.1  # in logSNR: a smaller first step has a gap that multistep samplers cannot divide by


@settings
class Sampler(ABC):
    """Walks down a time grid of `steps` steps; keeps no state between calls."""

    steps: Count
    time_grid: TimeGrid = EVEN_T

    jumps = False  # whether the model must be told where a step goes
    needs_consistency = False  # whether an estimate must be a sample, and not the mean of samples
    adaptive = False  # whether `steps` is only a limit, and the number depends on the network
    one_jump = False  # whether a step is one estimate's jump, which may keep the noise of another

    rules: ClassVar[Rules] = {
        "needs a model that is told where a step goes, and this one is not; train with "
        "objective=mean_flow or objective=shortcut": (
            lambda sampler, loss: sampler.jumps and not loss.two_levels
        ),
        "follows the mean of the samples that an image may become, and this model's estimate is "
        "one of the samples; use sampler=few_step": (
            lambda sampler, loss: loss.of_samples and not sampler.needs_consistency
        ),
        "needs a model of few steps, whose every estimate is a sample; train with objective=ect, "
        "consistency_distillation, mean_flow or shortcut": (
            lambda sampler, loss: sampler.needs_consistency and not loss.few_steps
        ),
    }

    @property
    def of_few_steps(self) -> bool:
        """Whether it asks for an answer that only models of few steps give."""
        return self.jumps or self.needs_consistency

    def __call__(
        self,
        denoise: DenoiseFn,
        noise: Tensor,
        schedule: NoiseSchedule,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws samples (B, C, H, W) from unit noise of that shape, in its dtype.

        `on_step` is called after each step.
        """
        levels = self.levels(schedule)
        x = levels[0].sigma * noise
        for state in self.walk(denoise, x, levels, schedule, randn_like):
            x = state  # a loop, as unpacking would keep every state alive
            on_step()
        return x

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        """The levels (steps + 1,) of a call; raises ValueError if they do not suit the sampler."""
        return self.time_grid(schedule, self.steps)

    def finish(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        here: NoiseLevel,
        schedule: NoiseSchedule,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Walks from noisy images x (B, C, H, W) at the level `here`, a scalar, to clean ones.

        The levels on the way are those of the time grid that are cleaner than `here`. If there are
        none, the result is one denoised estimate. `here` is neither pure noise nor clean data.
        """
        grid = self.time_grid(schedule, self.steps)
        cleaner = grid[grid.logsnr > here.logsnr + CLOSEST]  # clean data at least
        for state in self.walk(denoise, x, here[None].then(cleaner), schedule, randn_like):
            x = state
        return x

    @abstractmethod
    def walk(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        levels: NoiseLevel,
        schedule: NoiseSchedule,
        randn_like: Callable[[Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Yields the state after each step, from x (B, C, H, W) at levels[0].

        `levels` (steps + 1,) fall in noise; the last may be clean data, the others have sigma > 0.
        """
