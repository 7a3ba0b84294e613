"""Contrastive flow matching: the output is also pushed away from the targets of other samples.

The best output is (E[target | x] - weight E[target of others]) / (1 - weight): the exact one, moved
away from what is the same for all samples.
"""

from typing import Annotated

from diffusion_lab.common.ranges import inside, ranges
from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.objective.loss.base import Losses
from diffusion_lab.diffusion.objective.loss.denoising import Denoising
from diffusion_lab.diffusion.objective.loss.weighting import Weighting


class Contrastive(Denoising):
    """The denoising loss less `weight` times that to the next sample's target (arXiv:2506.05350).

    The next sample of the batch has its own image and noise, and is taken at this one's level. In a
    batch of one it is the sample itself.
    """

    @ranges()
    def __init__(
        self,
        weight: Annotated[float, inside(0, 1)] = 0.05,
        weighting: Weighting | None = None,
    ):
        super().__init__(weighting)
        self.weight = weight

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        estimate = denoiser(add_noise(x0, eps, level), level, given)
        own, other = (
            self.errors(
                parts.prediction, denoiser.clip, estimate, x0.roll(by, 0), eps.roll(by, 0), level
            )
            for by in (0, 1)
        )
        return Losses(own - self.weight * other, level, own)
