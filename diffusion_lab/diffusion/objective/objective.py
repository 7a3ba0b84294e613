"""The training objective: levels are drawn, images noised, and the losses of the answers returned.

level = time_sampler, eps, labels = noised, losses = loss(denoiser, x0, eps, level, labels)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import at_least, between, ranges
from diffusion_lab.diffusion.estimate import NOTHING, ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.objective.loss import Loss, Losses, Parts
from diffusion_lab.diffusion.objective.loss.base import check_losses
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.objective.teacher import TeacherModel, TeacherPairs
from diffusion_lab.diffusion.objective.time_sampler import WHOLE_BATCH, BatchShare, TimeSampler
from diffusion_lab.diffusion.schedule import NoiseSchedule

SELF_CONDITIONED = 0.5  # share of the steps that ask a self-conditioned network once more


# x0, eps (B, ...), labels (B,) or None -> the order (B,) of eps in which it is paired with x0
Coupling = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Objective(nn.Module):
    """The training objective; the denoiser must be built with the same `prediction`.

    It is a module, so statistics of the losses are saved with the weights. label_dropout,
    in [0, 1], is the share of labels replaced by the null label for classifier-free guidance.
    offset_noise is the std of noise that is constant over each channel and added to eps. A
    `teacher` is a trained model that is asked for pairs of samples and noise before training, or
    for steps during it. `coupling` pairs noise and images of a batch.
    """

    @ranges(label_dropout=between(0, 1), offset_noise=at_least(0))
    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        time_sampler: TimeSampler,
        loss: Loss,
        label_dropout: float = 0.0,
        offset_noise: float = 0.0,
        teacher: TeacherModel | TeacherPairs | None = None,
        coupling: Coupling | None = None,
    ):
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.time_sampler = time_sampler
        self.loss = loss
        self.label_dropout, self.offset_noise = label_dropout, offset_noise
        self.coupling = coupling
        self.teacher = teacher

    def extra_passes(self, denoiser: ConditionalDenoiser) -> float | None:
        """The loss's `extra_passes`, if they are counted, and those of self-conditioning."""
        own = self.loss.extra_passes
        return None if own is None else own + SELF_CONDITIONED * denoiser.self_conditioning

    def parts(self, images_seen: int = 0, place: int = 0) -> Parts:
        """The parts that a loss needs, after so many training images; `place` is as in `Parts`."""
        return Parts(
            self.schedule, self.prediction, self.time_sampler, self.teacher, images_seen, place
        )

    def noised(
        self,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        given: Given,
        eps: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Given]:
        """The noise (B, C, H, W) of samples x0, which may be given by eps, and what is told."""
        # float32 whatever the default dtype: bf16-true would make bf16 noise
        draw = partial(torch.randn, generator=generator, device=x0.device, dtype=torch.float32)
        if eps is None:
            eps = draw(x0.shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * draw((*x0.shape[:2], 1, 1))
        if self.coupling is not None:
            eps = eps[self.coupling(x0, eps, given.labels)]
        if given.labels is not None:
            dropped = denoiser.conditioning.drop(given.labels, self.label_dropout, generator)
            given = replace(given, labels=dropped)
        return eps, given

    def forward(
        self,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        given: Given = NOTHING,
        generator: torch.Generator | None = None,
        share: BatchShare = WHOLE_BATCH,
        eps: Tensor | None = None,
        images_seen: int = 0,
    ) -> Losses:
        """The losses (B,) float32 of clean samples x0 (B, C, H, W), at levels drawn here.

        `eps` is the unit noise of each sample; without it, it is drawn. The generator, if there is
        one, is on x0's device. Labels are dropped here; an augmentation never is. `images_seen` are
        the training images before this batch, for losses that change during training.
        """
        level, importance = self.time_sampler(len(x0), self.schedule, generator, share)
        level = level.to(x0.device)
        eps, given = self.noised(denoiser, x0, given, eps, generator)
        if denoiser.self_conditioning:
            given = replace(given, previous=torch.zeros_like(x0))  # one graph serves both
            # without a generator it is the CPU's, so as not to wait for a GPU
            device = generator.device if generator else "cpu"
            if torch.rand((), generator=generator, device=device).item() < SELF_CONDITIONED:
                with torch.no_grad():
                    previous = denoiser(add_noise(x0, eps, level), level, given).x0
                given = replace(given, previous=previous)
        parts = self.parts(images_seen, images_seen + share.index * len(x0))
        losses = self.loss(parts, denoiser, x0, eps, level, given, generator)
        check_losses(self.loss, losses, len(x0))  # others would be broadcast below
        times, plain = losses.observed
        self.time_sampler.observe(times, plain, share.gather)
        weighed = losses.minimised * importance.to(x0.device, non_blocking=True)
        return Losses(weighed, losses.level, plain)
