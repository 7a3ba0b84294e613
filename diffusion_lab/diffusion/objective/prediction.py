"""Prediction types: the network's output is F = a x0 + b eps, and (a, b) defines a type.

With x = alpha x0 + sigma eps, one inverse serves all: x0 = (sigma F - b x) / (a sigma - b alpha).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Flag, Positive, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast


class Prediction(ABC):
    """A quantity that the network predicts."""

    data_std: float | None = None  # std of clean data, where the prediction is scaled by it

    rules: ClassVar[Rules] = {
        "does not determine the image at pure noise, which this schedule reaches (alpha = 0 at t = "
        "1); use objective/prediction=v, flow or x0, or a schedule that keeps some signal, such "
        "as schedule=cosine": (
            lambda prediction, schedule: not prediction.x0_gain(schedule(torch.ones(()))).isfinite()
        ),
    }

    warnings: ClassVar[Rules] = {
        "multiplies the network's error more than a thousandfold at the noisiest level; use "
        "objective/prediction=v, or, for pixels, sample with guidance.clip=1": (
            lambda prediction, schedule, clipped: (
                not clipped and prediction.amplifies(schedule(torch.ones(())))
            )
        ),
    }

    @abstractmethod
    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Returns (a, b), float64 and of the level's shape."""

    def target(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """The output of a perfect network, of x0's shape."""
        a, b = self.mix(level)
        return broadcast(a, x0) * x0 + broadcast(b, x0) * eps

    def to_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        """The clean image that this output for x (B, C, H, W) implies; needs sigma > 0."""
        a, b = self.mix(level)
        scale = a * level.sigma - b * level.alpha
        return broadcast(level.sigma / scale, x) * output - broadcast(b / scale, x) * x

    def x0_gain(self, level: NoiseLevel) -> Tensor:
        """|d x0 / d F|, float64, of the level's shape; infinite where F does not determine x0."""
        a, b = self.mix(level)
        return (level.sigma / (a * level.sigma - b * level.alpha)).abs()

    def amplifies(self, level: NoiseLevel) -> bool:
        """Whether an error of x0 is 1000 times that of the output, relative to the output's size.

        Samples of good models then fail. An unscaled score is small where its gain is large.
        """
        return bool(self.x0_gain(level) * torch.hypot(*self.mix(level)) > 1000)


class X0(Prediction):
    """The clean image itself."""

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.alpha), torch.zeros_like(level.sigma)


class Eps(Prediction):
    """The noise (arXiv:2006.11239); says nothing of x0 on pure noise."""

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), torch.ones_like(level.sigma)


class V(Prediction):
    """alpha eps - sigma x0 (arXiv:2202.00512)."""

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


class Flow(Prediction):
    """eps - x0, the velocity of the straight path from data to noise (arXiv:2209.03003)."""

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(level.alpha), torch.ones_like(level.sigma)


@settings
class EDM(Prediction):
    """Unit-variance residual of the best linear denoiser (arXiv:2206.00364, for any alpha).

    data_std is the standard deviation of the clean data: 0.5 for images in [-1, 1], 1 for latents.
    """

    data_std: Positive = 0.5

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        total_std = (level.alpha**2 * self.data_std**2 + level.sigma**2).sqrt()
        return (level.sigma / (self.data_std * total_std), -level.alpha * self.data_std / total_std)


@settings
class Score(Prediction):
    """The gradient of log p(x), -eps / sigma (arXiv:1907.05600); says nothing of x0 on pure noise.

    With `scale_by_sigma` the network's output is divided by sigma, so the network itself predicts
    a value of unit size at every level (arXiv:2006.09011, technique 3).
    """

    scale_by_sigma: Flag = True

    def mix(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        unit = -torch.ones_like(level.sigma)
        return torch.zeros_like(level.alpha), unit if self.scale_by_sigma else unit / level.sigma
