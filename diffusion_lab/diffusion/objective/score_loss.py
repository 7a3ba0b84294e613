"""Score matching that does not use the noise: E (|s|^2 + 2 tr ds/dx) / D of a score s(x).

By Stein's identity it is less than denoising score matching by the same constant for every score
(Hyvarinen 2005; Vincent 2011), which is 1 if both are multiplied by sigma^2. So it trains the same
model, and works where only noisy data exist. B samples of D numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast


def score_of(
    denoiser: ConditionalDenoiser, level: NoiseLevel, given: Given
) -> Callable[[Tensor], Tensor]:
    """The score (alpha x0 - x) / sigma^2 of a denoiser at a level (B,), as a function of x."""

    def score(x: Tensor) -> Tensor:
        x0 = denoiser(x, level, given).x0
        return (broadcast(level.alpha, x) * x0 - x) / broadcast(level.sigma**2, x)

    return score


class ScoreLoss(ABC):
    """A score matching loss; it takes forward-mode derivatives of the denoiser."""

    most: int | None = None  # the largest D that it is meant for

    @abstractmethod
    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        """Vectors v like x (B, ...) for which the mean of v^T J v is tr J."""

    def __call__(
        self,
        denoiser: ConditionalDenoiser,
        x: Tensor,
        level: NoiseLevel,
        given: Given,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss (B,) of noisy samples x (B, C, H, W) at a level (B,)."""
        score, traces = x, torch.zeros_like(x)
        vectors = self.directions(x, generator)
        for vector in vectors:
            score, slope = derivative(score_of(denoiser, level, given), (x,), (vector,))
            traces = traces + vector * slope / len(vectors)
        return (score.square() + 2 * traces).flatten(1).mean(1)


@settings
class SlicedScoreMatching(ScoreLoss):
    """tr J from random directions: sliced score matching with reduced variance (arXiv:1905.07088).

    Directions have numbers of 1 and -1.
    """

    projections: Count = 1

    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        shape = (self.projections, *x.shape)
        signs = torch.randint(2, shape, generator=generator, device=x.device)
        return [*(2 * signs - 1).to(x.dtype)]


class ExactScoreMatching(ScoreLoss):
    """tr J from one derivative for each of the D numbers (Hyvarinen 2005): for few numbers."""

    most = 64

    def directions(self, x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        count = x[0].numel()
        units = count**0.5 * torch.eye(count, device=x.device, dtype=x.dtype)
        return [unit.view_as(x[:1]).expand_as(x) for unit in units]
