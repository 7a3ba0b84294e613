"""The training loss as one object: what is minimised, and what it asks of all other parts.

A loss of jumps moves along the exact path, f(x, here, there) = jump(x, x0_hat, here, there), where
x0_hat is the denoiser's answer when it is told both levels. With `there` = `here` it is the
denoised estimate, and with clean data as `there` it is the sample itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import above, inside, optional, ranges
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import NOTHING, ConditionalDenoiser, Estimate, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise
from diffusion_lab.diffusion.objective.loss.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.loss.variance import Hybrid
from diffusion_lab.diffusion.objective.loss.weighting import Weighting
from diffusion_lab.diffusion.objective.prediction import X0, Prediction
from diffusion_lab.diffusion.objective.teacher import TeacherModel, TeacherPairs
from diffusion_lab.diffusion.objective.time_sampler import TimeSampler
from diffusion_lab.diffusion.schedule import NoiseSchedule

FACTS = ("two_levels", "told_scale", "of_samples", "differentiates_time", "variance")
TINY = 1e-12  # of a squared distance: there is nothing to divide by


@dataclass(frozen=True)
class Parts:
    """The other parts of an objective, and how far training is.

    `images_seen` are those before this batch, and `place` is that of its first sample in training.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    time_sampler: TimeSampler
    teacher: TeacherModel | TeacherPairs | None = None
    images_seen: int = 0
    place: int = 0

    def count(self, share: float, batch: int) -> int:
        """How many of the next `batch` samples belong to a share of all samples of training.

        The share is exact over training, however a batch is divided.
        """
        return int(share * (self.place + batch)) - int(share * self.place)


class Losses(NamedTuple):
    """The losses (B,) that training minimises, and the levels (B,) that they are of.

    `plain` (B,) are the losses before anything that weighs levels during training; None if there
    is nothing of the kind.
    """

    minimised: Tensor
    level: NoiseLevel
    plain: Tensor | None = None

    @property
    def observed(self) -> tuple[Tensor, Tensor]:
        """The times and the plain losses, (B,) each, without gradient."""
        losses = self.minimised if self.plain is None else self.plain
        return self.level.t, losses.detach()


def check_losses(owner: object, losses: object, count: int) -> None:
    """Raises UserError unless a loss or an objective has returned losses of `count` images."""
    name = type(owner).__name__
    if not isinstance(losses, Losses):
        kind = type(losses).__name__
        raise UserError(f"{name} must return Losses(minimised, level), got a {kind}")
    check_each(f"minimised of {name}", losses.minimised, count)
    check_each(f"level of {name}", losses.level.t, count)
    if losses.plain is not None:
        check_each(f"plain of {name}", losses.plain, count)


def check_each(name: str, values: object, count: int) -> None:
    """Raises UserError, which begins with a name, unless each of `count` images has a value."""
    shape = getattr(values, "shape", None)
    if shape != (count,):
        got = f"a {type(values).__name__}" if shape is None else f"{tuple(shape)} for B = {count}"
        raise UserError(
            f"{name} must have shape (B,), a value for each of B images and no mean of them, got "
            f"{got}"
        )


def weighed(losses: Tensor, level: NoiseLevel, uncertainty: LearnedUncertainty | None) -> Losses:
    """The losses (B,) at levels (B,), divided by what a learned uncertainty expects there."""
    if uncertainty is None:
        return Losses(losses, level)
    expected = uncertainty(level)
    return Losses(losses * (-expected).exp() + expected, level, losses)


class Loss(ABC):
    """A training loss; it is a torch module, too, if it has weights of its own.

    `weighting`, `huber` and `variance` are those of the denoising loss, by which every model is
    validated; only a loss with these arguments trains by them.
    """

    two_levels = False  # whether the denoiser is told where a jump goes
    told_scale: bool = False  # whether the denoiser is told a scale of guidance
    of_samples = False  # whether its only answer is a sample, and not the mean of samples
    asks_teacher = False  # whether a trained model is asked during training
    forward_mode = False  # whether it takes a forward-mode derivative of the denoiser
    differentiates_time = False  # whether that is with respect to the time

    weighting: Weighting | None = None
    huber: float | None = None
    variance: Hybrid | None = None

    rules: ClassVar[Rules] = {
        "asks a trained model in each step, and objective/teacher=model is not chosen; write "
        "objective=consistency_distillation, which chooses both": (
            lambda loss, teacher: loss.asks_teacher and not (teacher and teacher.asked)
        ),
        "asks no trained model, which objective/teacher=model is; write "
        "objective=consistency_distillation, which chooses both": (
            lambda loss, teacher: teacher and teacher.asked and not loss.asks_teacher
        ),
        "is for few steps, and denoiser.self_conditioning=true makes each depend on the one "
        "before; write denoiser.self_conditioning=false": (
            lambda loss, self_conditioning: loss.few_steps and self_conditioning
        ),
        "does not fit denoiser.clip={clip}: the network's answer for a jump is no image, and may "
        "exceed any limit; write denoiser.clip=null": (
            lambda loss, clip: loss.two_levels and clip is not None
        ),
        "does not fit denoiser.clip={clip}: it compares estimates, and where they are clipped it "
        "has no gradient; write denoiser.clip=null": (
            lambda loss, clip: loss.of_samples and clip is not None
        ),
        "needs an estimate that is the image itself where there is no noise, which the network's "
        "own output is not; write objective/prediction=edm, v, flow or eps": (
            lambda loss, prediction: loss.of_samples and isinstance(prediction, X0)
        ),
        "needs levels between those of a table; use a continuous schedule, such as "
        "schedule=rectified or schedule=cosine": (
            lambda loss, schedule: loss.few_steps and schedule.discrete_steps is not None
        ),
        "takes a forward-mode derivative of the network, which a compiled one does not have; write "
        "compile=auto": (
            lambda loss, compiled: loss.forward_mode and compiled not in (False, "auto")
        ),
        "takes a forward-mode derivative of the network, which layers that run again do not have; "
        "write activation_checkpointing=false": (
            lambda loss, recomputed: loss.forward_mode and recomputed
        ),
        "takes no plain step of denoising, in which alignment compares a layer with the image; "
        "write alignment=none": (
            lambda loss, aligned: aligned and (loss.few_steps or loss.forward_mode)
        ),
    }
    warnings: ClassVar[Rules] = {}  # of what can be trained, but may disappoint

    @property
    def extra_passes(self) -> float | None:
        """The network's forward passes on a sample, in the mean, beside the one with a gradient.

        None if they are not counted.
        """
        return 0.0

    @property
    def facts(self) -> dict[str, bool]:
        """The facts of a loss that drawing must know, as `Recorded` takes them."""
        return {name: bool(getattr(self, name)) for name in FACTS}

    @property
    def few_steps(self) -> bool:
        """Whether it trains a model that draws a sample in few steps."""
        return self.two_levels or self.of_samples

    @abstractmethod
    def __call__(
        self,
        parts: Parts,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        given: Given,
        generator: torch.Generator | None,
    ) -> Losses:
        """The losses of clean samples x0 (B, C, H, W) with noise eps.

        Their levels are `level` (B,), or those that the loss puts in their place.
        """

    def measured(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        denoiser: ConditionalDenoiser,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
        given: Given = NOTHING,
    ) -> Tensor:
        """The denoising loss (B,) of samples x0 (B, C, H, W) with noise eps at a level (B,)."""
        x = add_noise(x0, eps, level)
        estimate = denoiser(x, level, given)
        exact = at_limit(denoiser.clip, estimate, x0)
        losses = self.errors(prediction, exact, estimate, x0, eps, level)
        if self.variance is not None:
            losses = losses + self.variance(x, x0, estimate, level, schedule)
        return losses

    def errors(
        self,
        prediction: Prediction,
        exact: Tensor | None,
        estimate: Estimate,
        x0: Tensor,
        eps: Tensor,
        level: NoiseLevel,
    ) -> Tensor:
        """The weighted squared errors (B,) of estimates for samples x0 with noise eps.

        Where `exact` (B, C, H, W), if given, is true, there is none.
        """
        assert estimate.output is not None, "a denoiser answers with its output"
        error = estimate.output - prediction.target(x0, eps, level)  # (B, C, H, W)
        if exact is not None:
            error = error.masked_fill(exact, 0)
        losses = mean_square(error)
        gain = prediction.x0_gain(level) ** 2  # from errors of the output to those of x0
        if self.huber is not None:
            # of the error that is weighted, so that a prediction type makes no difference
            scale = 1 if self.weighting is None else gain.to(losses.dtype)
            losses = pseudo_huber(losses * scale, self.huber) / scale
        if self.weighting is not None:
            losses = losses * (self.weighting(level.logsnr) * gain).to(losses.dtype)
        return losses

    def trained_for(self, start: Tensor, end: Tensor) -> Tensor:
        """Whether training makes each of the jumps between these t, (n,) float64 each."""
        return torch.ones_like(start, dtype=torch.bool)


def at_limit(clip: float | None, estimate: Estimate, x0: Tensor) -> Tensor | None:
    """The mask (B, C, H, W) of estimates that are clamped to the limit that x0 is at; None without.

    There they are exact, however far the output is beyond.
    """
    return None if clip is None else (estimate.x0 == x0) & (x0.abs() == clip)


class Recorded(Loss):
    """The facts of a loss whose class is no longer there, to draw with the model it trained."""

    def __init__(self, **facts: bool):
        vars(self).update(facts)

    def measured(self, *parts):
        """Raises UserError: nothing more is known of the loss."""
        raise UserError("the class of this run's objective.loss is no longer there; restore it")

    __call__ = measured


@contextmanager
def same_dropout(x: Tensor) -> Iterator[None]:
    """A context whose random draws on x's device are drawn again after it."""
    with torch.random.fork_rng([x.device.index or 0] if x.is_cuda else []):
        yield


def adaptive(squares: Tensor, power: float, floor: float) -> Tensor:
    """Squares (B,) divided by themselves, without gradient, to a power (arXiv:2505.13447).

    A power of 1/2 has the gradient of the pseudo-Huber loss. `floor` is added to the divisor.
    """
    return squares / (squares.detach() + floor) ** power


def mean_square(error: Tensor) -> Tensor:
    """The mean square of an error (B, ...) in each sample, (B,)."""
    return error.square().flatten(1).mean(1)


def pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c, without its cancellation where the squared error is small."""
    return square / ((square + c**2).sqrt() + c)


class Denoising(nn.Module, Loss):
    """|output - target|^2, or weight(logSNR) |x0_hat - x0|^2, the weighted error of x0.

    x0_hat is linear in the output, so the two differ by the factor (d x0 / d output)^2. A denoiser
    that clips x0_hat has no error where it is clipped to x0 itself. The best estimate stays the
    mean of x0 given x, since an estimate of bounded data that is within the bounds loses nothing by
    this. With a pseudo-Huber loss it is between the mean and the median.
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
        return weighed(losses, level, self.uncertainty)


class Contrastive(Denoising):
    """The denoising loss less `weight` times that to the next sample's target (arXiv:2506.05350).

    The best output is (E[target | x] - weight E[target of others]) / (1 - weight): the exact one,
    moved away from what is the same for all samples. The next sample of the batch has its own image
    and noise, and is taken at this one's level. In a batch of one it is the sample itself. Where a
    clamped estimate is exact, neither counts.
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
        # what has no error of its own is not pushed away from others: nothing would pull it back
        exact = at_limit(denoiser.clip, estimate, x0)
        errors = partial(self.errors, parts.prediction, exact, estimate, level=level)
        own, other = errors(x0, eps), errors(x0.roll(1, 0), eps.roll(1, 0))
        return Losses(own - self.weight * other, level, own)
