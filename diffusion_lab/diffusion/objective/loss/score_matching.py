"""Score matching that does not use the noise: E (|s|^2 + 2 tr ds/dx) / D of a score s(x).

By Stein's identity it is less than denoising score matching by the same constant for every score
(Hyvarinen 2005; Vincent 2011), which is 1 if both are multiplied by sigma^2. So it trains the same
model, and works where only noisy data exist. B samples of D numbers.
"""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast
from diffusion_lab.diffusion.objective.loss.base import Loss, Losses
from diffusion_lab.diffusion.objective.loss.weighting import Weighting
from diffusion_lab.diffusion.objective.prediction import Prediction

DRAWN = 4096  # levels at which the weights of a score are looked at
MOST = 64  # numbers of a sample for which exact score matching is meant
LARGEST_WEIGHT = 1e5  # of a score's error, in units of 1 / sigma^2


def counts_without_limit(loss, schedule, prediction, time_sampler) -> bool:
    """Whether single samples that are almost pure noise would rule the loss."""
    level, _ = time_sampler(DRAWN, schedule, torch.Generator().manual_seed(0))
    weight = loss.weight_of_score(prediction, level) / level.sigma**2
    return not weight.nan_to_num(math.inf).max() < LARGEST_WEIGHT


@settings
class ScoreMatching(Loss):
    """A score matching loss; it takes forward-mode derivatives of the denoiser."""

    weighting: Weighting | None = None

    forward_mode = True
    extra_passes = None  # derivatives are not counted

    rules: ClassVar[Rules] = {
        "learns the score of images with independent normal noise, and this noise is another; "
        "write coupling=none objective.offset_noise=0 objective/teacher=none": (
            lambda loss, coupling, offset_noise, teacher: coupling or offset_noise or teacher
        ),
        "would be ruled by single samples that are almost pure noise, where this prediction and "
        "weighting count errors of the score without limit; write objective/loss/weighting=snr, "
        "and a schedule that keeps some signal": counts_without_limit,
        "needs a derivative of the estimate, which is 0 beyond denoiser.clip={clip}; write "
        "denoiser.clip=null": lambda loss, clip: clip is not None,
        "takes a derivative of the estimate with respect to x, and an estimate from an earlier one "
        "depends on x in that, too; write denoiser.self_conditioning=false": (
            lambda loss, self_conditioning: self_conditioning
        ),
    }

    @abstractmethod
    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        """Vectors v like x (B, ...) for which the mean of v^T J v is tr J."""

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        x = add_noise(x0, eps, level)
        weight = self.weight_of_score(parts.prediction, level)
        losses = self.matched(denoiser, x, level, given, generator)
        return Losses(losses * weight.to(losses), level)

    def matched(
        self,
        denoiser: ConditionalDenoiser,
        x: Tensor,
        level: NoiseLevel,
        given: Given,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The unweighted loss (B,) of noisy samples x (B, C, H, W) at a level (B,)."""

        def score_at(x: Tensor) -> Tensor:
            x0 = denoiser(x, level, given).x0
            return (broadcast(level.alpha, x) * x0 - x) / broadcast(level.sigma**2, x)

        score, traces = x, torch.zeros_like(x)
        vectors = self.directions(x, generator)
        for vector in vectors:
            score, slope = derivative(score_at, (x,), (vector,))
            traces = traces + vector * slope / len(vectors)
        return (score.square() + 2 * traces).flatten(1).mean(1)

    def weight_of_score(self, prediction: Prediction, level: NoiseLevel) -> Tensor:
        """The weight (B,) of the score's squared error in the denoising loss, float64."""
        weight = prediction.x0_gain(level) ** -2
        if self.weighting is not None:
            weight = self.weighting(level.logsnr)
        return weight * (level.sigma**2 / level.alpha) ** 2  # x0 moves by so much with the score


@settings
class SlicedScoreMatching(ScoreMatching):
    """tr J from random signs: sliced score matching with reduced variance (arXiv:1905.07088)."""

    projections: Count = 1

    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        shape = (self.projections, *x.shape)
        signs = torch.randint(2, shape, generator=generator, device=x.device)
        return [*(2 * signs - 1).to(x.dtype)]


class ExactScoreMatching(ScoreMatching):
    """tr J from one derivative for each of the D numbers (Hyvarinen 2005): for few numbers."""

    rules: ClassVar[Rules] = {
        "takes one derivative for each number of {shape}, and is for 64 at most; write "
        "objective/loss=sliced_score_matching": lambda loss, shape: math.prod(shape) > MOST,
    }

    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        count = x[0].numel()
        units = count**0.5 * torch.eye(count, device=x.device, dtype=x.dtype)
        return [unit.view_as(x[:1]).expand_as(x) for unit in units]
