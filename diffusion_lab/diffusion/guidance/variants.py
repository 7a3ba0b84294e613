"""Guidance that pushes elsewhere than straight from the weak estimate to the strong one."""

import math
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import (
    Fraction,
    Number,
    Range,
    above,
    at_least,
    inside,
    optional,
    settings,
)
from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate, Given
from diffusion_lab.diffusion.guidance.base import TINY, Guidance, asking
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast

ABOVE = Range("above 0, inf or null", lambda v: v in (None, math.inf) or above(0).allows(v))
ROUNDING = 1e-6  # relative, of a sigma / alpha that is written as a limit


@settings
class ProjectedGuidance(Guidance):
    """Adaptive projected guidance (arXiv:2410.02416): a direction that saturates less.

    `parallel` multiplies the part of strong - weak along the strong estimate; `norm_limit`, if
    given, bounds the difference's length; `momentum`, negative for the paper's reverse momentum,
    adds that share of the previous direction. parallel = 1 without limit and momentum is
    classifier-free guidance.
    """

    parallel: Number = 0.0
    norm_limit: Annotated[float | None, optional(above(0))] = None
    momentum: Annotated[float, inside(-1, 1)] = 0.0

    def direction(self, difference: Tensor, last: Tensor | None) -> Tensor:
        return difference if last is None else difference + self.momentum * last

    def push(self, strong: Tensor, direction: Tensor) -> Tensor:
        flat, along = direction.flatten(1), strong.flatten(1)
        if self.norm_limit is not None:
            length = flat.norm(dim=1, keepdim=True)
            flat = flat * (self.norm_limit / length).clamp(max=1)
        size = along.square().sum(1, keepdim=True).clamp(min=TINY)
        share = (flat * along).sum(1, keepdim=True) / size
        flat = flat - (1 - self.parallel) * share * along
        return super().push(strong, flat.view_as(strong))


def at_rest(x: Tensor, level: NoiseLevel) -> Tensor:
    """The x0 whose velocity eps - x0 at x (B, ...) is 0: x / (alpha + sigma)."""
    return x / broadcast(level.alpha + level.sigma, x)


@settings
class ZeroStarGuidance(Guidance):
    """CFG-Zero* (arXiv:2503.18886): the weak velocity is first scaled to fit the strong one.

    The velocity is eps - x0, rectified flow's. Its factor is <strong, weak> / |weak|^2, sample by
    sample. On pure noise and at any sigma / alpha above `zero_above` the velocity is 0, at every
    scale and without a network call, so such steps are left out. With inf that is pure noise alone,
    and null never does so. A learned variance is the small one there.
    """

    zero_above: Annotated[float | None, ABOVE] = math.inf

    def against(self, x: Tensor, level: NoiseLevel, strong: Tensor, weak: Tensor) -> Tensor:
        rest = at_rest(x, level)
        ahead, behind = (rest - strong).flatten(1), (rest - weak).flatten(1)  # both velocities
        size = behind.square().sum(1, keepdim=True).clamp(min=TINY)
        share = (ahead * behind).sum(1, keepdim=True) / size
        return rest - (share * behind).view_as(rest)

    def bind(self, denoiser, labels, weak=None, classifier=None):
        denoise, limit = super().bind(denoiser, labels, weak, classifier), self.zero_above
        if limit is None:
            return denoise

        def rested(x: Tensor, level: NoiseLevel) -> Estimate:
            # a level at the limit, however rounded, is not above it; nothing is above inf times 0
            above = level.sigma > limit * (1 + ROUNDING) * level.alpha
            noisy = above | (level.alpha == 0)
            if noisy.all():
                return Estimate(at_rest(x, level), torch.zeros_like(x))
            estimate = denoise(x, level)
            if noisy.any():  # each sample has its own level
                x0 = torch.where(broadcast(noisy, x).bool(), at_rest(x, level), estimate.x0)
                estimate = estimate._replace(x0=x0)
            return estimate

        return rested


@settings
class PlusPlusGuidance(Guidance):
    """CFG++ (arXiv:2406.08070): x0 between the estimates, and the noise of the weak one.

    A step leads to alpha x0 + sigma eps with x0 = weak + scale (strong - weak) and the weak eps. In
    terms of usual guidance, its scale is divided by the share of noise that the step removes: it is
    stronger in smaller steps, and no limit of many steps exists. scale is in [0, 1], and at 1 not
    the model itself. It needs a sampler whose step is a jump with one estimate.
    """

    keeps_weak_noise = True
    uses_weak = True

    scale: Fraction = 0.6


@settings
class EmbeddedGuidance(Guidance):
    """The scale is told to a network that was trained with many (arXiv:2512.02012): one call.

    Outside of the interval, and without a label, it is told 1.
    """

    told_scale = True
    uses_weak = False
    uses_strong = True

    scale: Annotated[float, at_least(1)] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale or self.weak_run is not None:
            raise ValueError(
                "rescale and weak_run take a second estimate, and this guidance has one; write "
                "rescale=0 weak_run=null"
            )

    def ask(self, denoiser, labels, weak, classifier):
        def ask(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
            scale = None
            if labels is not None:
                scale = torch.where(self.inside(level), self.scale, 1.0).reshape(-1)
            return denoiser(x, level, Given(labels, previous, scale=scale))

        return ask


def keep_known(denoise: DenoiseFn, known: Tensor, mask: Tensor) -> DenoiseFn:
    """Inpainting by replacement at sampling time (arXiv:2011.13456, section I.2).

    Where `mask`, broadcast to x, is true, the estimate is the clean image `known` (B, ...): a
    sampler then carries alpha known + sigma eps there, with its own noise, and ends on `known`. The
    paper replaces the state x with fresh noise instead; neither is an exact conditional.
    """

    def inpainted(x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x, level)
        kept = estimate.noise_x0
        return estimate._replace(
            x0=torch.where(mask, known, estimate.x0),
            noise_x0=None if kept is None else torch.where(mask, known, kept),
        )

    return inpainted


@settings
class ClassifierGuidance(Guidance):
    """Classifier guidance (arXiv:2105.05233), by the class of the estimate x0 (arXiv:2302.07121).

    x0 becomes x0 + scale sigma^2 / alpha grad log p(label | x0): the score of images with labels is
    that of all images plus the gradient in x of log p(label | x). Here the probability is that of
    the estimate x0 of x, which is differentiated, too: a backward pass through the network at each
    call. Scale 0 is the model itself, and 1 Bayes' rule for such a probability. Pure noise tells no
    classes apart, and is not guided.
    """

    by_classifier = True
    uses_weak = False
    uses_strong = True

    classifier: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weak_run is not None:
            raise ValueError("weak_run has no part in guidance by a classifier; write null")

    def ask(self, denoiser, labels, weak, classifier):
        plain = asking(denoiser, labels)
        if self.scale == 0:
            return plain
        if classifier is None or labels is None:
            raise ValueError("classifier needs its function, and every sample a label")

        def ask(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
            inside = self.inside(level) & (level.alpha > 0)
            if not inside.any():
                return plain(x, level, previous)
            # copies, since tensors made in inference mode have no gradients
            with torch.inference_mode(False), torch.enable_grad():
                free, own = x.clone().detach().requires_grad_(), labels.clone()
                values = {name: getattr(level, name).clone() for name in ("t", "alpha", "sigma")}
                given = Given(own, None if previous is None else previous.clone())
                estimate = denoiser(free, replace(level, **values), given)
                (slope,) = torch.autograd.grad(classifier(estimate.x0, own).sum(), free)
            strong, weight = estimate.x0.detach(), estimate.log_variance_weight
            # pure noise beside other levels: 0 in place of a division by 0
            gain = self.scale * (level.sigma**2 / level.alpha).where(inside, 0)
            x0 = self.settled(strong + broadcast(gain, x) * slope, strong, inside)
            return Estimate(x0, None if weight is None else weight.detach())

        return ask
