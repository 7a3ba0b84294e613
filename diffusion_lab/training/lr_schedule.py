"""Learning-rate schedules: a factor on the optimiser's learning rate.

`images` is the number of images the run has seen. `progress` in [0, 1] is the share of its steps or
of its time limit that is done, the larger one. Warm-up is in images, so no batch size changes it.
"""

import math
from typing import Annotated

from diffusion_lab.common.ranges import Count, Fraction, at_least, settings, whole

Images = Annotated[int, whole(0)]


def warm_up(images: int, warmup_images: int) -> float:
    """Rises linearly from 0 to 1 over the first `warmup_images`."""
    return min(1.0, images / warmup_images) if warmup_images else 1.0


@settings
class ConstantRate:
    """Warms up to 1, then falls linearly to 0 over the last `cooldown` share of the run."""

    warmup_images: Images = 0
    cooldown: Fraction = 0.0

    def __call__(self, images: int, progress: float) -> float:
        left = min(1.0, (1 - progress) / self.cooldown) if self.cooldown else 1.0
        return warm_up(images, self.warmup_images) * left


@settings
class CosineDecay:
    """Multiplies the warm-up by half a cosine that falls from 1 to `final` over the run."""

    warmup_images: Images = 0
    final: Annotated[float, at_least(0)] = 0.0

    def __call__(self, images: int, progress: float) -> float:
        decay = self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return warm_up(images, self.warmup_images) * decay


@settings
class InverseSqrt:
    """Multiplies the warm-up by 1 / sqrt(images / reference_images), once that is below 1.

    The rate depends on neither the length nor the end of the run (arXiv:2312.02696).
    """

    warmup_images: Images = 0
    reference_images: Count = 1

    def __call__(self, images: int, progress: float) -> float:
        decay = max(images / self.reference_images, 1.0) ** -0.5
        return warm_up(images, self.warmup_images) * decay
