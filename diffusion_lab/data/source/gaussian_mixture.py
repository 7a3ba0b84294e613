"""A mixture of two Gaussians in the plane, whose scores are known."""

from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import above, inside, settings
from diffusion_lab.data.source.plane import PointsInPlane

MEANS = ((-0.5, -0.5), (0.5, 0.5))


@settings
class GaussianMixture(PointsInPlane):
    """Points around (-0.5, -0.5) and (0.5, 0.5), one class each, with standard deviation `std`.

    `share` of them lie around the first, so the two regions of the data are unequal.
    """

    class_names = ("lower left", "upper right")

    std: Annotated[float, above(0)] = 0.1
    share: Annotated[float, inside(0, 1)] = 0.2

    def points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws points of both Gaussians in their shares, at random."""
        labels = (torch.rand(count, generator=generator) >= self.share).long()
        noise = torch.randn(count, 2, generator=generator)
        return torch.tensor(MEANS)[labels] + self.std * noise, labels

    def log_density(self, points: Tensor, sigma: float = 0.0) -> Tensor:
        """The log density (N,) at points (N, 2); the data have noise of std `sigma`."""
        variance = self.std**2 + sigma**2
        squares = (points[:, None] - torch.tensor(MEANS).to(points)).square().sum(2)  # (N, 2)
        shares = torch.tensor([self.share, 1 - self.share]).to(points)
        logs = shares.log() - squares / (2 * variance)
        return logs.logsumexp(1) - torch.tensor(2 * torch.pi * variance).log()

    def score(self, points: Tensor, sigma: float = 0.0) -> Tensor:
        """The gradient of `log_density` at points (N, 2): (N, 2)."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_density(points, sigma).sum(), points)
        return gradient
