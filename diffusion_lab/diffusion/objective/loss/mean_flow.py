"""MeanFlow: jumps learned from the velocity alone, by a forward-mode derivative.

The end of a jump, f(x, here, there), stays where it is while x and `here` move along the exact
path: df/dt = 0. f is linear in the network's output, f = k(t) F + ..., and so df/dt is 0 if F is
F* = F - (df/dt) / k'(t). On the straight path F* is the velocity less (t - s) dF/dt.
"""

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Fraction, Positive, at_least, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import ConditionalDenoiser, Given
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump, noise_of
from diffusion_lab.diffusion.objective.loss.base import (
    Loss,
    Losses,
    Parts,
    adaptive,
    mean_square,
)
from diffusion_lab.diffusion.objective.prediction import Prediction
from diffusion_lab.diffusion.schedule import NoiseSchedule

FLAT = 0.05  # of the largest slope, below which a slope counts as 0


@settings
class MeanFlow(Loss):
    """|F - F*|^2 by `adaptive`, without gradient through F* (arXiv:2505.13447).

    A share `instant` of the samples does not jump, and trains the denoised estimate. The others go
    to a second draw of the time sampler; the noisier of the two levels is where they start. With
    `guidance` above 1 the path is the one guided by that scale, so sampling needs no second call;
    dropped labels train the plain path. `power` in [0, 1] is that of `adaptive`.
    """

    instant: Fraction = 0.25
    guidance: Annotated[float, at_least(1)] = 1.0
    power: Fraction = 0.75
    floor: Positive = 1e-3

    two_levels = forward_mode = differentiates_time = True

    rules: ClassVar[Rules] = {
        ".instant={loss.instant} trains no jumps; write a number below 1, or "
        "objective=flow_matching": lambda loss: loss.instant == 1,
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
        first, second = level.t, torch.where(stays, level.t, other.t)
        return parts.schedule(first.maximum(second)), parts.schedule(first.minimum(second))

    def guided(
        self, denoiser: ConditionalDenoiser, x: Tensor, x0: Tensor, here: NoiseLevel, given: Given
    ) -> Tensor:
        """The clean samples (B, C, H, W) that the guided path at x heads for."""
        with torch.no_grad():
            weak = denoiser(x, here, replace(given, labels=None)).x0
        if given.labels is None:
            return x0
        kept = ~denoiser.conditioning.labels.is_null(given.labels).to(x.device)
        return torch.where(broadcast(kept, x).bool(), torch.lerp(weak, x0, self.guidance), x0)


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
    one = torch.ones_like(here.t)
    _, (d_alpha, d_sigma) = derivative(parts.schedule.coefficients, (here.t,), (one,))
    eps = noise_of(x, x0, here)
    velocity = broadcast(d_alpha, x) * x0 + broadcast(d_sigma, x) * eps

    def end(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        level = parts.schedule(t)
        estimate = denoiser(x, level.towards(there), given)
        assert estimate.output is not None, "a denoiser answers with its output"
        return jump(x, estimate.x0, level, there), estimate.output

    (_, output), (drift, _) = derivative(end, (x, here.t), (velocity, one))
    slope = slope_of_output(parts.schedule, parts.prediction, here, there)
    return output, (output - drift / broadcast(slope, x)).detach()


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
