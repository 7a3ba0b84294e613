"""What a denoiser answers, and the function that a sampler asks."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffusion_lab.diffusion.noise import NoiseLevel


class Estimate(NamedTuple):
    """The denoised estimate x0, and where the reverse variance lies, if the network learns it.

    `variance` is a position from 0 to 1 between the logs of `posterior`'s small variance and of its
    large one (arXiv:2102.09672); a network may overshoot. Both are (B, C, H, W).
    """

    x0: Tensor
    variance: Tensor | None = None


class Output(NamedTuple):
    """What a network gives in its own prediction space, and `Estimate.variance`."""

    value: Tensor
    variance: Tensor | None = None


DenoiseFn = Callable[[Tensor, NoiseLevel], Estimate]  # the condition is already bound
