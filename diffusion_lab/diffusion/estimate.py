"""The question to a denoiser, its answer, and the function that a sampler calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, jump


@dataclass(frozen=True)
class Given:
    """Everything that an estimate of x0 is conditioned on, besides x and its level.

    `labels` are classes (B,) int64, or numbers (B, K) float; None is unconditional. `previous`
    (B, C, H, W) is the last estimate of x0, for self-conditioning; None is zeros. `augmentation`
    (B, values) says what was done to x0; None is nothing, zeros. `scale` (B,) is that of a guidance
    which the estimate already has; None is 1. A denoiser ignores what it was not built for.
    """

    labels: Tensor | None = None
    previous: Tensor | None = None
    augmentation: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, index: slice) -> "Given":
        """The conditions of some of the samples."""
        return Given(*(None if part is None else part[index] for part in vars(self).values()))


NOTHING = Given()


class Estimate(NamedTuple):
    """The denoised estimate x0, and what else the network says; all are (B, C, H, W).

    `log_variance_weight` is a position from 0 to 1 between the logs of `lowered`'s small variance
    and of its large one, if the network learns it (arXiv:2102.09672); a network may overshoot.
    `output` is the network's own, in its prediction space, float32 at least. `noise_x0` is the x0
    whose noise a step keeps, if that is not x0 itself (CFG++).
    """

    x0: Tensor
    log_variance_weight: Tensor | None = None
    output: Tensor | None = None
    noise_x0: Tensor | None = None

    def jump(self, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
        """Moves x (B, ...) from `here` to `there`: there.alpha x0 + there.sigma eps."""
        moved = jump(x, self.x0, here, there)
        if self.noise_x0 is None:
            return moved
        # the noise of another x0 is (x - alpha noise_x0) / sigma
        share = here.alpha * there.sigma / here.sigma
        return moved + broadcast(share, x) * (self.x0 - self.noise_x0)


DenoiseFn = Callable[[Tensor, NoiseLevel], Estimate]  # the condition is already bound


class ConditionalDenoiser(Protocol):
    """The part of a `Denoiser` that training and guidance need."""

    conditioning: Any
    self_conditioning: Any
    clip: Any

    def __call__(self, x: Tensor, level: NoiseLevel, given: Given = ..., /) -> Estimate:
        """The estimate for x (B, C, H, W) at `level`."""
