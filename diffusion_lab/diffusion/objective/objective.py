"""The training loss: weight(logSNR) |x0_hat - x0|^2, or plainly |output - target|^2.

x0_hat is linear in the output, so the two differ by the factor (d x0 / d output)^2. A denoiser that
clips x0_hat has no error where it is clipped to x0 itself. The best estimate stays the mean of x0
given x, since an estimate of bounded data that is within the bounds loses nothing by this. With a
pseudo-Huber loss it is between the mean and the median.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import above, at_least, between, optional, ranges
from diffusion_lab.diffusion.estimate import NOTHING, ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise
from diffusion_lab.diffusion.objective.jump_loss import JumpLoss
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.objective.score_loss import ScoreLoss
from diffusion_lab.diffusion.objective.teacher import TeacherModel, TeacherPairs
from diffusion_lab.diffusion.objective.time_sampler import WHOLE_BATCH, BatchShare, TimeSampler
from diffusion_lab.diffusion.objective.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.variance_loss import Hybrid
from diffusion_lab.diffusion.objective.weighting import Weighting
from diffusion_lab.diffusion.schedule import NoiseSchedule

SELF_CONDITIONED = 0.5  # share of the steps that ask a self-conditioned network once more

# x0, eps (B, ...), labels (B,) or None -> the order (B,) of eps in which it is paired with x0
Coupling = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Objective(nn.Module):
    """The training objective; the denoiser must be built with the same `prediction`.

    It is a module, so statistics of the losses are saved with the weights. label_dropout,
    in [0, 1], is the share of labels replaced by the null label for classifier-free guidance.
    offset_noise is the std of noise that is constant over each channel and added to eps. `huber`
    is the c of a loss sqrt(error + c^2) - c in place of the mean squared error (arXiv:2310.14189,
    whose c is that of a sum and sqrt(D) larger). `coupling` pairs noise and images of a batch. A
    `jump_loss` takes the place of the denoising loss in training, for models of few steps. A
    `teacher` is a trained model that is asked for pairs of samples and noise before training, or
    for steps during it. A `score_loss` is a score matching loss that does without the noise.
    """

    @ranges(label_dropout=between(0, 1), offset_noise=at_least(0), huber=optional(above(0)))
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
        jump_loss: JumpLoss | None = None,
        teacher: TeacherModel | TeacherPairs | None = None,
        huber: float | None = None,
        coupling: Coupling | None = None,
        score_loss: ScoreLoss | None = None,
    ):
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.time_sampler = time_sampler
        self.weighting = weighting
        self.variance_loss = variance_loss
        self.uncertainty = uncertainty
        self.label_dropout = label_dropout
        self.offset_noise = offset_noise
        self.jump_loss = jump_loss
        self.teacher = teacher
        self.huber = huber
        self.coupling = coupling
        self.score_loss = score_loss
        self.images_seen = 0  # before this batch, for losses that change during training
        self.place = 0  # in training, of the first sample of the last call
        # t and the losses before their importance, (B,) each, of the last call, to watch training
        self.observed: tuple[Tensor, Tensor] | None = None

    @property
    def jumps(self) -> bool:
        """Whether the denoiser must be told where a step goes."""
        return self.jump_loss is not None and self.jump_loss.two_levels

    @property
    def of_samples(self) -> bool:
        """Whether the denoiser's only answer is a sample, and not the mean of samples."""
        return self.jump_loss is not None and not self.jump_loss.two_levels

    @property
    def forward_mode(self) -> bool:
        """Whether a forward-mode derivative of the denoiser is taken."""
        if self.score_loss is not None:
            return True
        return self.jump_loss is not None and self.jump_loss.forward_mode

    def extra_passes(self, denoiser: ConditionalDenoiser) -> float | None:
        """The network's forward passes on a sample, in the mean, beside the one with a gradient.

        None for score matching, whose derivatives are not counted.
        """
        if self.score_loss is not None:
            return None
        of_jumps = 0.0 if self.jump_loss is None else self.jump_loss.extra_passes
        return of_jumps + SELF_CONDITIONED * denoiser.self_conditioning

    def forward(
        self,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        given: Given = NOTHING,
        generator: torch.Generator | None = None,
        share: BatchShare = WHOLE_BATCH,
        eps: Tensor | None = None,
    ) -> Tensor:
        """The loss of each clean sample x0 (B, C, H, W), at levels drawn here: (B,) float32.

        `eps` is the unit noise of each sample; without it, it is drawn. The generator, if there is
        one, is on x0's device. Labels are dropped here; an augmentation never is.
        """
        level, importance = self.time_sampler(len(x0), self.schedule, generator, share)
        level = level.to(x0.device)
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
        if denoiser.self_conditioning and coin(generator):
            with torch.no_grad():
                previous = denoiser(add_noise(x0, eps, level), level, given).x0
            given = replace(given, previous=previous)
        self.place = self.images_seen + share.index * len(x0)
        losses, level = self.training_loss_at(denoiser, x0, eps, level, given, generator)
        self.observed = level.t, losses.detach()
        self.time_sampler.observe(*self.observed, share.gather)
        if self.uncertainty is not None:
            expected = self.uncertainty(level)
            losses = losses * (-expected).exp() + expected
        return losses * importance.to(x0.device, non_blocking=True)

    def training_loss_at(
        self,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        given: Given,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, NoiseLevel]:
        """The loss (B,) that training minimises, and its levels (B,), which jumps may choose.

        It is `loss_at`, that of jumps, or that of score matching.
        """
        if self.score_loss is not None:
            x = add_noise(x0, eps, level)
            losses = self.score_loss(denoiser, x, level, given, generator)
            return losses * self.weight_of_score(level).to(losses), level
        if self.jump_loss is None:
            return self.loss_at(denoiser, x0, eps, level, given), level
        return self.jump_loss(self, denoiser, x0, eps, level, given, generator)

    def loss_at(
        self,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        given: Given = NOTHING,
    ) -> Tensor:
        """The loss of each sample with this noise eps (B, C, H, W) at this level (B,): (B,).

        It leaves out the learned uncertainty, which says nothing about the model.
        """
        x = add_noise(x0, eps, level)
        estimate = denoiser(x, level, given)
        assert estimate.output is not None, "a denoiser answers with its output"
        target = self.prediction.target(x0, eps, level)
        error = estimate.output - target  # (B, C, H, W)
        if denoiser.clip is not None:
            # a clamped estimate at the same limit as x0 is exact, however far the output is beyond
            exact = (estimate.x0 == x0) & (x0.abs() == denoiser.clip)
            error = error.masked_fill(exact, 0)
        losses = error.square().flatten(1).mean(1)  # (B,)
        gain = self.prediction.x0_gain(level) ** 2  # from errors of the output to those of x0
        if self.huber is not None:
            # of the error that is weighted, so that a prediction type makes no difference
            scale = 1 if self.weighting is None else gain.to(losses.dtype)
            losses = pseudo_huber(losses * scale, self.huber) / scale
        if self.weighting is not None:
            losses = losses * (self.weighting(level.logsnr) * gain).to(losses.dtype)
        if self.variance_loss is not None:
            losses = losses + self.variance_loss(x, x0, estimate, level, self.schedule)
        return losses

    def weight_of_score(self, level: NoiseLevel) -> Tensor:
        """The weight (B,) of the score's squared error in `loss_at`, float64."""
        weight = self.prediction.x0_gain(level) ** -2
        if self.weighting is not None:
            weight = self.weighting(level.logsnr)
        return weight * (level.sigma**2 / level.alpha) ** 2  # x0 moves by so much with the score


def pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c, without its cancellation where the squared error is small."""
    return square / ((square + c**2).sqrt() + c)


def coin(generator: torch.Generator | None) -> bool:
    """Whether a step asks a self-conditioned network once more."""
    # without a generator it is the CPU's, so as not to wait for a GPU
    device = generator.device if generator else "cpu"
    return torch.rand((), generator=generator, device=device).item() < SELF_CONDITIONED
