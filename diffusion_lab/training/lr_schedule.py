"""Learning-rate schedules: a factor on the optimiser's learning rate.

`images` is how many images the run has seen, `progress` in [0, 1] how much of it is done, by steps
or by its time limit, whichever is further. Warm-up is in images, so no batch size changes it.
"""

import math

from diffusion_lab.common.ranges import at_least, between, ranges, whole


def warm_up(images: int, warmup_images: int) -> float:
    """Linear from 0 to 1 over the first `warmup_images`."""
    return min(1.0, images / warmup_images) if warmup_images else 1.0


class ConstantRate:
    """Warm-up, then 1, then linearly to 0 over the last `cooldown` share of the run."""

    @ranges(warmup_images=whole(0), cooldown=between(0, 1))
    def __init__(self, warmup_images: int = 0, cooldown: float = 0.0):
        self.warmup_images = warmup_images
        self.cooldown = cooldown

    def __call__(self, images: int, progress: float) -> float:
        left = min(1.0, (1 - progress) / self.cooldown) if self.cooldown else 1.0
        return warm_up(images, self.warmup_images) * left


class CosineDecay:
    """Warm-up, then half a cosine from 1 to `final` over the run."""

    @ranges(warmup_images=whole(0), final=at_least(0))
    def __init__(self, warmup_images: int = 0, final: float = 0.0):
        self.warmup_images = warmup_images
        self.final = final

    def __call__(self, images: int, progress: float) -> float:
        decay = self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return warm_up(images, self.warmup_images) * decay
