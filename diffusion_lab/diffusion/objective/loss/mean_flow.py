"""MeanFlow and its variants: jumps learned from the velocity, by a forward-mode derivative.

The end of a jump, f(x, here, there), stays where it is while x and `here` move along the exact
path: df/dt = 0. f is linear in the network's output, f = k(t) F + ..., and so df/dt is 0 if F is
F* = F - (df/dt) / k'(t). On the straight path F* is the velocity less (t - s) dF/dt.
"""

import math
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Count, Fraction, Positive, at_least, settings, whole
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import (
    Loss,
    Losses,
    Parts,
    adaptive,
    mean_square,
    same_dropout,
)
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.schedule import NoiseSchedule


@settings
class Jumps(Loss):
    """A loss of jumps between two draws of the time sampler, from the noisier to the cleaner.

    A share `instant` of the samples does not jump, and trains the denoised estimate.
    """

    instant: Fraction = 0.25

    two_levels = True

    rules: ClassVar[Rules] = {
        ".instant={loss.instant} trains no jumps; write a number below 1, or "
        "objective=flow_matching": lambda loss: loss.instant == 1,
    }


def between(
    schedule: NoiseSchedule, first: Tensor, second: Tensor
) -> tuple[NoiseLevel, NoiseLevel]:
    """The levels, both (B,), of jumps between times (B,), from the later to the earlier."""
    return schedule(first.maximum(second)), schedule(first.minimum(second))


def rates(schedule: NoiseSchedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The derivatives of alpha and sigma with respect to t at levels (B,)."""
    return derivative(schedule.coefficients, (level.t,), (torch.ones_like(level.t),))[1]


FLAT = 0.05  # of the largest slope, below which a slope counts as 0


@settings
class MeanFlow(Jumps):
    """|F - F*|^2 by `adaptive`, without gradient through F* (arXiv:2505.13447).

    With `guidance` above 1 the path is the one guided by that scale, so sampling needs no second
    call; dropped labels train the plain path. `power` in [0, 1] is that of `adaptive`.
    """

    guidance: Annotated[float, at_least(1)] = 1.0
    power: Fraction = 0.75
    floor: Positive = 1e-3

    forward_mode = differentiates_time = True

    rules: ClassVar[Rules] = {
        ".guidance={loss.guidance} asks the network without labels, which "
        "objective.label_dropout=0 does not train; write objective.label_dropout=0.1": (
            lambda loss, label_dropout: loss.guidance != 1 and not label_dropout
        ),
        ".guidance={loss.guidance} needs labels; write objective.loss.guidance=1, or train with "
        "conditioning=class_label": (
            lambda loss, conditional: loss.guidance != 1 and not conditional
        ),
    }
    warnings: ClassVar[Rules] = {
        "learns from a derivative that denoiser.noise_label=time makes a thousand times steeper, "
        "and samples worse; write denoiser.noise_label=auto, unless init_from has weights with "
        "this label": lambda loss, noise_label: noise_label == "time",
        "does not determine all jumps to an image with this schedule and prediction, so samples of "
        "one call may fail; write schedule=rectified objective/prediction=flow": (
            lambda loss, schedule, prediction: undetermined(schedule, prediction)
        ),
    }

    @property
    def extra_passes(self) -> float:
        """The derivative, which costs a pass, and a call without labels for a guided path."""
        return 1.0 + (self.guidance != 1)

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)
        if self.guidance != 1:
            x0 = self.guided(denoiser, x, x0, here, given)
        output, target = flow_target(parts, denoiser, x, x0, here, there, given)
        return Losses(adaptive(mean_square(output - target), self.power, self.floor), here)

    def ends(
        self, parts: Parts, level: NoiseLevel, generator: torch.Generator | None
    ) -> tuple[NoiseLevel, NoiseLevel]:
        """The start and the end, both (B,), of each sample's jump."""
        other = parts.time_sampler(len(level), parts.schedule, generator)[0].to(level.t.device)
        device = generator.device if generator else "cpu"
        stays = torch.rand(len(level), generator=generator, device=device) < self.instant
        stays = stays.to(level.t.device, non_blocking=True)
        return between(parts.schedule, level.t, torch.where(stays, level.t, other.t))

    def guided(
        self, denoiser: ConditionalDenoiser, x: Tensor, x0: Tensor, here: NoiseLevel, given: Given
    ) -> Tensor:
        """The clean samples (B, C, H, W) that the guided path at x heads for."""
        with torch.no_grad():
            weak = denoiser(x, here, replace(given, labels=None)).x0
        kept = labelled(denoiser, given, x)
        return torch.where(broadcast(kept, x).bool(), torch.lerp(weak, x0, self.guidance), x0)


def labelled(denoiser: ConditionalDenoiser, given: Given, x: Tensor) -> Tensor:
    """Whether each of the samples x has a label that is not dropped, (B,)."""
    if given.labels is None:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return ~denoiser.conditioning.labels.is_null(given.labels).to(x.device)


def flow_target(
    parts: Parts,
    denoiser: ConditionalDenoiser,
    x: Tensor,
    x0: Tensor,
    here: NoiseLevel,
    there: NoiseLevel,
    given: Given,
) -> tuple[Tensor, Tensor]:
    """The output F and its target F*, of x's shape, where the path at x heads for x0."""
    d_alpha, d_sigma = rates(parts.schedule, here)
    eps = noise_of(x, x0, here)
    velocity = broadcast(d_alpha, x) * x0 + broadcast(d_sigma, x) * eps
    output, drift = along_path(parts, denoiser, x, velocity, here, there, given)
    slope = slope_of_output(parts.schedule, parts.prediction, here, there)
    return output, (output - drift / broadcast(slope, x)).detach()


def along_path(
    parts: Parts,
    denoiser: ConditionalDenoiser,
    x: Tensor,
    velocity: Tensor,
    here: NoiseLevel,
    there: NoiseLevel,
    given: Given,
) -> tuple[Tensor, Tensor]:
    """The output F, and the derivative of the jump's end along the path at x, of x's shape."""

    def end(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        level = parts.schedule(t)
        estimate = denoiser(x, level.towards(there), given)
        assert estimate.output is not None, "a denoiser answers with its output"
        return jump(x, estimate.x0, level, there), estimate.output

    moves = (velocity, torch.ones_like(here.t))
    (_, output), (drift, _) = derivative(end, (x, here.t), moves)
    return output, drift


def slope_of_output(
    schedule: NoiseSchedule, prediction: Prediction, here: NoiseLevel, there: NoiseLevel
) -> Tensor:
    """k'(t) at `here`, (B,), where the end of a jump is k(t) F + ... of the output F."""

    def share(t: Tensor) -> Tensor:
        level, zero = schedule(t), torch.zeros_like(t)
        return jump(zero, prediction.to_x0(zero + 1, zero, level), level, there)

    return derivative(share, (here.t,), (torch.ones_like(here.t),))[1]


def undetermined(schedule: NoiseSchedule, prediction: Prediction) -> bool:
    """Whether the target is undetermined for some jump to an image.

    Its divisor, the change of the jump's end with the output, is then 0 on the way or near 0 at the
    noisiest level.
    """
    starts = schedule(torch.linspace(0.01, 1, 100, dtype=torch.float64))
    clean = schedule(torch.full((100,), 1e-4))
    slopes = slope_of_output(schedule, prediction, starts, clean)
    steady = (slopes > 0).all() or (slopes < 0).all()
    return not (steady and slopes[-1].abs() > FLAT * slopes.abs().max())


ROUNDED = 0.005  # difference of alpha from 0 or 1 that counts as none


@settings
class AlphaFlow(MeanFlow):
    """The error of a jump to its first share alpha and a jump for the rest (arXiv:2510.20771).

    A jump should end where its first share alpha, which goes straight to the clean sample, and a
    jump for the rest do: MeanFlow's jumps from finite steps that become shorter. alpha = 1 is flow
    matching of whole jumps, and the limit of alpha = 0 is MeanFlow.
    alpha falls along a sigmoid from 1, before `start_images` training images, to 0, after
    `end_images`; `steepness` is the sigmoid's. The other settings are MeanFlow's, and so is the
    loss where alpha is 0. The squared error is divided by alpha, as it shrinks with its square.
    """

    start_images: Annotated[int, whole(0)] = 0
    end_images: Count = 1_280_000
    steepness: Positive = 25.0

    def __post_init__(self) -> None:
        if self.end_images <= self.start_images:
            raise ValueError(
                f"end_images={self.end_images} must be above start_images={self.start_images}"
            )

    def alpha(self, images_seen: int) -> float:
        """The share, in [0, 1], after so many training images."""
        span = self.end_images - self.start_images
        progress = (images_seen - self.start_images) / span - 0.5
        share = (1 - math.tanh(self.steepness * progress / 2)) / 2
        nearest = round(share)
        return nearest if abs(share - nearest) < ROUNDED else share

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        alpha = self.alpha(parts.images_seen)
        if alpha == 0:
            return super().__call__(parts, denoiser, x0, eps, level, given, generator)
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)
        if self.guidance != 1:
            x0 = self.guided(denoiser, x, x0, here, given)
        if alpha < 1:
            x0 = halted(parts, denoiser, alpha, x, x0, here, there, given)
        output = denoiser(x, here.towards(there), given).output
        error = output - parts.prediction.target(x0, noise_of(x, x0, here), here)
        share = torch.where(here.t == there.t, 1.0, alpha).to(error)
        squares = mean_square(error) / share**2
        return Losses(share * adaptive(squares, self.power, self.floor), here)


@torch.no_grad()
def halted(
    parts: Parts,
    denoiser: ConditionalDenoiser,
    alpha: float,
    x: Tensor,
    x0: Tensor,
    here: NoiseLevel,
    there: NoiseLevel,
    given: Given,
) -> Tensor:
    """The x0 (B, C, H, W) with which one jump ends where the two do, the first towards x0."""
    middle = parts.schedule(here.t + alpha * (there.t - here.t))
    with same_dropout(x):
        further = denoiser(jump(x, x0, here, middle), middle.towards(there), given).x0
    # both jumps are linear in their x0, so the whole one's is a mean of the two
    whole, rest = share_of_x0(here, there), share_of_x0(middle, there)
    weight = torch.where(whole == 0, 0, rest / whole)
    return torch.lerp(x0, further, broadcast(weight, x))


def share_of_x0(here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """The derivative (B,) of a jump's end with respect to its x0."""
    return there.alpha - there.sigma / here.sigma * here.alpha


@settings
class ImprovedMeanFlow(MeanFlow):
    """|F - F*|^2 by `adaptive`, whose derivative is along F's own path (arXiv:2512.02012).

    F* depends on the velocity of the path in two places: in the derivative, where the network's own
    is taken, and outside of it, where the pair's is right on average. On the straight path the loss
    is |F + (t - s) dF/dt - (eps - x0)|^2, flow matching by what jumps say of a velocity.
    Half of the samples do not jump, as F's path must be learned, too. `guidance` above 1 is the
    largest of the scales that are drawn, with a density of 1 / scale. The network is told the scale
    of each sample, and guidance=embedded chooses one.
    """

    instant: Fraction = 0.5

    def __post_init__(self) -> None:
        self.told_scale = self.guidance != 1

    @property
    def extra_passes(self) -> float:
        """The network's own velocity, the derivative, and a call without labels if guided."""
        return 2.0 + self.told_scale

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)
        if self.told_scale:
            scale = self.scales(labelled(denoiser, given, x), generator)
            given = replace(given, scale=scale)
        with torch.no_grad(), same_dropout(x):
            own = denoiser(x, here, given).x0
        if self.told_scale:
            with torch.no_grad():
                weak = denoiser(x, here, replace(given, labels=None, scale=None)).x0
            # own is weak + scale (strong - weak), and so is this on average, as sharp as x0
            x0 = x0 + broadcast(1 - 1 / scale, x) * (own - weak)
        output, target = flow_target(parts, denoiser, x, own, here, there, given)
        target = target + change_of_target(parts, x0 - own, here, there)
        return Losses(adaptive(mean_square(output - target), self.power, self.floor), here)

    def scales(self, kept: Tensor, generator: torch.Generator | None) -> Tensor:
        """A scale for each sample, (B,): 1 where its label is not `kept`, (B,) bool."""
        device = generator.device if generator else "cpu"
        drawn = torch.rand(len(kept), generator=generator, device=device).to(kept.device)
        return torch.where(kept, (math.log(self.guidance) * drawn).exp(), 1)


def change_of_target(parts: Parts, change: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """The change of F* if the path heads for x0 + change (B, C, H, W), and the derivative stays."""
    d_alpha, d_sigma = rates(parts.schedule, here)
    velocity = broadcast(d_alpha - d_sigma * here.alpha / here.sigma, change) * change
    x0 = parts.prediction.to_x0(torch.zeros_like(velocity), velocity, here)
    slope = slope_of_output(parts.schedule, parts.prediction, here, there)
    return -jump(velocity, x0, here, there) / broadcast(slope, change)
