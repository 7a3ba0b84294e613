"""The training loss: weight(logSNR) |x0_hat - x0|^2, or plainly |output - target|^2.

x0_hat is linear in the output, so the two differ by the factor (d x0 / d output)^2.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_lab.noise import NoiseLevel, add_noise
from diffusion_lab.schedule import NoiseSchedule

from .prediction import Prediction
from .time_sampler import TimeSampler
from .weighting import Weighting

if TYPE_CHECKING:
    from diffusion_lab.denoiser import Denoiser


class Objective:
    """What is minimised; the denoiser must be built with the same `prediction`.

    label_dropout, in [0, 1], is the share of labels replaced by the null label for classifier-free
    guidance.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        time_sampler: TimeSampler,
        weighting: Weighting | None = None,
        label_dropout: float = 0.0,
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"objective.label_dropout={label_dropout} must be in [0, 1]")
        self.schedule = schedule
        self.prediction = prediction
        self.time_sampler = time_sampler
        self.weighting = weighting
        self.label_dropout = label_dropout

    def __call__(
        self,
        denoiser: "Denoiser",
        x0: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of each clean sample x0 (B, C, H, W), at levels drawn here: (B,) float32.

        The generator, if given, is on x0's device.
        """
        level, importance = self.time_sampler(len(x0), self.schedule, generator)
        # float32 whatever the default dtype: bf16-true would make bf16 noise
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float32)
        if labels is not None:
            labels = denoiser.conditioning.drop(labels, self.label_dropout, generator)
        losses = self.loss_at(denoiser, x0, eps, level.to(x0.device), labels)
        return losses * importance.to(x0.device)

    def loss_at(
        self,
        denoiser: "Denoiser",
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample with this noise eps (B, C, H, W) at this level (B,): (B,)."""
        output = denoiser.output(add_noise(x0, eps, level), level, labels)
        target = self.prediction.target(x0, eps, level)
        losses = (output - target).square().flatten(1).mean(1)  # (B,)
        if self.weighting is not None:
            weight = self.weighting(level.logsnr) * self.prediction.x0_gain(level) ** 2
            losses = losses * weight.to(losses.dtype)
        return losses
