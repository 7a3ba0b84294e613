"""The training loss: weight(logSNR) |x0_hat - x0|^2, or plainly |output - target|^2.

x0_hat is linear in the output, so the two differ by the factor (d x0 / d output)^2.
"""

import torch
from torch import Tensor, nn

from diffusion_lab.diffusion.noise import NoiseLevel, add_noise
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.objective.time_sampler import Gather, TimeSampler
from diffusion_lab.diffusion.objective.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.variance_loss import Hybrid
from diffusion_lab.diffusion.objective.weighting import Weighting
from diffusion_lab.diffusion.schedule import NoiseSchedule


class Objective(nn.Module):
    """What is minimised; the denoiser must be built with the same `prediction`.

    A module, so that what it learns of the losses is kept with the weights. label_dropout, in
    [0, 1], is the share of labels replaced by the null label for classifier-free guidance.
    offset_noise is the std of noise that is constant over each channel and added to eps.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        time_sampler: TimeSampler,
        weighting: Weighting | None = None,
        variance_loss: Hybrid | None = None,
        uncertainty: LearnedUncertainty | None = None,
        label_dropout: float = 0.0,
        offset_noise: float = 0.0,
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"objective.label_dropout={label_dropout} must be in [0, 1]")
        if offset_noise < 0:
            raise ValueError(f"objective.offset_noise={offset_noise} must be 0 or more; 0 is off")
        self.schedule = schedule
        self.prediction = prediction
        self.time_sampler = time_sampler
        self.weighting = weighting
        self.variance_loss = variance_loss
        self.uncertainty = uncertainty
        self.label_dropout = label_dropout
        self.offset_noise = offset_noise

    def forward(
        self,
        denoiser: nn.Module,
        x0: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        part: int = 0,
        parts: int = 1,
        gather: Gather | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """What is minimised for each clean sample x0 (B, C, H, W), at levels drawn here: (B,).

        float32; the generator, if given, is on x0's device. part, parts and gather are the time
        sampler's: which share of a batch this is, and how the losses of other processes are had.
        `augmentation` (B, ...) is told to the denoiser: what was done to x0. It is never dropped.
        """
        level, importance = self.time_sampler(len(x0), self.schedule, generator, part, parts)
        level = level.to(x0.device)
        # float32 whatever the default dtype: bf16-true would make bf16 noise
        draw = {"generator": generator, "device": x0.device, "dtype": torch.float32}
        eps = torch.randn(x0.shape, **draw)
        if self.offset_noise:
            eps = eps + self.offset_noise * torch.randn((*x0.shape[:2], 1, 1), **draw)
        if labels is not None:
            labels = denoiser.conditioning.drop(labels, self.label_dropout, generator)
        previous = None
        if denoiser.self_conditioning and coin(generator):
            with torch.no_grad():
                x = add_noise(x0, eps, level)
                previous = denoiser(x, level, labels, augmentation=augmentation).x0
        losses = self.loss_at(denoiser, x0, eps, level, labels, previous, augmentation)
        self.time_sampler.observe(level.t, losses.detach(), gather)
        if self.uncertainty is not None:
            expected = self.uncertainty(level)
            losses = losses * (-expected).exp() + expected
        return losses * importance.to(x0.device)

    def loss_at(
        self,
        denoiser: nn.Module,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        labels: Tensor | None = None,
        previous: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample with this noise eps (B, C, H, W) at this level (B,): (B,).

        Without the learned uncertainty, which is no measure of the model. `previous` is the
        estimate (B, C, H, W) that the denoiser is conditioned on, if it is on one.
        """
        x = add_noise(x0, eps, level)
        output = denoiser.output(x, level, labels, previous, augmentation)
        target = self.prediction.target(x0, eps, level)
        losses = (output.value - target).square().flatten(1).mean(1)  # (B,)
        if self.weighting is not None:
            weight = self.weighting(level.logsnr) * self.prediction.x0_gain(level) ** 2
            losses = losses * weight.to(losses.dtype)
        if self.variance_loss is not None:
            x0_hat = self.prediction.to_x0(output.value, x, level)
            losses = losses + self.variance_loss(
                x, x0, x0_hat, output.variance, level, self.schedule
            )
        return losses


def coin(generator: torch.Generator | None) -> bool:
    """True half of the time."""
    # without a generator from the CPU's, not to wait for a GPU
    device = generator.device if generator else "cpu"
    return torch.rand((), generator=generator, device=device).item() < 0.5
