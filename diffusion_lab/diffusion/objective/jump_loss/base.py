"""Losses of jumps along the exact path, f(x, here, there) = jump(x, x0_hat, here, there).

x0_hat is the denoiser's answer when it is told both levels. With `there` = `here` it is the
denoised estimate, and with clean data as `there` it is the sample itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.objective.time_sampler import TimeSampler
from diffusion_lab.diffusion.schedule import NoiseSchedule

TINY = 1e-12  # of a squared distance: there is nothing to divide by


class Parts(Protocol):
    """The parts of an objective that a loss of jumps needs."""

    schedule: NoiseSchedule
    prediction: Prediction
    time_sampler: TimeSampler
    images_seen: int
    place: int
    teacher: Any


class JumpLoss(ABC):
    """The training loss of a model that jumps."""

    two_levels = True  # whether the denoiser is told where a jump goes
    teaches = False  # whether a trained model is asked during training
    forward_mode = False  # whether it takes a forward-mode derivative of the denoiser

    @property
    def extra_passes(self) -> float:
        """The network's forward passes on a sample, in the mean, beside the one with a gradient."""
        return 0.0

    @abstractmethod
    def __call__(
        self,
        parts: Parts,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        given: Given,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, NoiseLevel]:
        """The loss (B,) of clean samples x0 (B, C, H, W) with noise eps, and its levels (B,).

        The levels are `level` (B,), or those that the loss puts in their place.
        """


@contextmanager
def same_dropout(x: Tensor) -> Iterator[None]:
    """A context whose random draws on x's device are drawn again after it."""
    with torch.random.fork_rng([x.device.index or 0] if x.is_cuda else []):
        yield


def adaptive(squares: Tensor, power: float, floor: float) -> Tensor:
    """Squares (B,) divided by themselves, without gradient, to a power (arXiv:2505.13447).

    A power of 1/2 has the gradient of the pseudo-Huber loss. `floor` is added to the divisor.
    """
    return squares / (squares.detach() + floor) ** power


def mean_square(error: Tensor) -> Tensor:
    """The mean square of an error (B, ...) in each sample, (B,)."""
    return error.square().flatten(1).mean(1)
