"""The denoising loss: weight(logSNR) |x0_hat - x0|^2, or plainly |output - target|^2.

x0_hat is linear in the output, so the two differ by the factor (d x0 / d output)^2. A denoiser that
clips x0_hat has no error where it is clipped to x0 itself. The best estimate stays the mean of x0
given x, since an estimate of bounded data that is within the bounds loses nothing by this. With a
pseudo-Huber loss it is between the mean and the median.
"""

from typing import Annotated, ClassVar

from torch import nn

from diffusion_lab.common.ranges import above, inside, optional, ranges
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.objective.loss.base import Loss, Losses
from diffusion_lab.diffusion.objective.loss.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.loss.variance import Hybrid
from diffusion_lab.diffusion.objective.loss.weighting import Weighting


class Denoising(nn.Module, Loss):
    """The squared error of the network's output, or the weighted one of x0.

    `huber` is the c of a loss sqrt(error + c^2) - c in place of the mean squared error
    (arXiv:2310.14189, whose c is that of a sum and sqrt(D) larger). A learned `uncertainty` weighs
    levels in training alone, since it says nothing about the model.
    """

    rules: ClassVar[Rules] = {
        "with a variance needs a schedule with a table, and this one has none; use "
        "objective/loss/variance=none, or a discrete schedule such as schedule=ddpm_linear": (
            lambda loss, schedule: loss.variance and (schedule.discrete_steps or 0) < 2
        ),
    }

    @ranges(huber=optional(above(0)))
    def __init__(
        self,
        weighting: Weighting | None = None,
        variance: Hybrid | None = None,
        uncertainty: LearnedUncertainty | None = None,
        huber: float | None = None,
    ):
        super().__init__()
        self.weighting = weighting
        self.variance = variance
        self.uncertainty = uncertainty
        self.huber = huber

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        losses = self.measured(parts.schedule, parts.prediction, denoiser, x0, eps, level, given)
        if self.uncertainty is None:
            return Losses(losses, level)
        expected = self.uncertainty(level)
        return Losses(losses * (-expected).exp() + expected, level, losses)


class Contrastive(Denoising):
    """The denoising loss less `weight` times that to the next sample's target (arXiv:2506.05350).

    The best output is (E[target | x] - weight E[target of others]) / (1 - weight): the exact one,
    moved away from what is the same for all samples.
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
