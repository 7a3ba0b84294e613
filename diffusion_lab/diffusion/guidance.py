"""Guidance, between the denoiser and the sampler: x0 = weak + scale (strong - weak)."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Fraction, Number, above, inside, numbers, optional, settings
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate, Given
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast

# x, its level and the last x0 -> the estimate, or a strong estimate and a weak x0
Ask = Callable[[Tensor, NoiseLevel, Tensor | None], Estimate]
AskBoth = Callable[[Tensor, NoiseLevel, Tensor | None], tuple[Estimate, Tensor]]
INTERVAL = numbers(
    "two values of sigma / alpha, the lower one first",
    lambda value: len(value) == 2 and 0 <= value[0] < value[1],
).as_in([0.2, 5])
TINY = 1e-12  # where an estimate is constant or 0, there is nothing to divide by


@settings
class Guidance:
    """Guidance of x0 away from a weaker estimate, the same for all channels.

    The weak estimate is the unconditional model's (classifier-free, arXiv:2207.12598), or is made
    by a smaller or earlier run, `weak_run`, with the same labels (autoguidance, arXiv:2406.02507).
    scale 1 is exactly the model itself and 0 exactly the weak one, in one network call; any other
    scale takes both inside `interval`, a range of sigma / alpha (arXiv:2404.07724), and the model
    itself outside. `rescale` in [0, 1] moves the result's standard deviation to the model's own
    (arXiv:2305.08891). `clip`, if given, clamps x0 to [-clip, clip]: 1 for images in [-1, 1] is
    DDPM's clip_denoised.
    """

    scale: Number = 1.0
    interval: Annotated[Sequence[float], INTERVAL] = (0.0, math.inf)
    rescale: Fraction = 0.0
    clip: Annotated[float | None, optional(above(0))] = None
    weak_run: str | None = None

    def direction(self, difference: Tensor, last: Tensor | None) -> Tensor:
        """Returns where to push, from strong - weak (B, ...) and the last call's direction."""
        return difference

    def push(self, strong: Tensor, direction: Tensor) -> Tensor:
        """The guided x0 (B, ...), not yet rescaled."""
        return strong + (self.scale - 1) * direction

    def rescaled(self, guided: Tensor, strong: Tensor) -> Tensor:
        """Moves the standard deviation of `guided` towards that of `strong`, sample by sample."""
        axes = tuple(range(1, strong.ndim))
        ratio = strong.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=TINY)
        return guided * (1 + self.rescale * (ratio - 1))

    def inside(self, level: NoiseLevel) -> Tensor:
        """Whether sigma / alpha is in the interval, of the level's shape."""
        (low, high), ratio = self.interval, level.sigma / level.alpha
        return (low <= ratio) & (ratio <= high)

    def bind(
        self, denoiser: Denoiser, labels: Tensor | None, weak: Denoiser | None = None
    ) -> DenoiseFn:
        """The function that one walk of a sampler calls, for these labels (B,) int64 or None.

        `weak` is the denoiser of `weak_run`. What a walk remembers (self-conditioning's last
        estimate, a direction's momentum) lives in this function, so each walk binds anew.
        """
        if weak is None and self.weak_run is not None:
            raise ValueError("weak_run needs its denoiser: bind(denoiser, labels, weak)")
        ask = asking(denoiser, labels)
        if self.scale == 0:
            ask = asking(denoiser, None) if weak is None else asking(weak, labels)
        elif self.scale != 1 and weak is not None:
            ask = guided(self, ask, with_weak(ask, weak, labels))
        elif self.scale != 1:
            if labels is None or not denoiser.conditioning.conditional:
                raise ValueError(
                    f"scale={self.scale} needs a model trained on labels; use 1 for no guidance"
                )
            ask = guided(self, ask, with_unlabelled(denoiser, labels))
        return self_conditioned(ask if self.clip is None else clipped(ask, self.clip))


def asking(denoiser: Denoiser, labels: Tensor | None) -> Ask:
    """Binds a denoiser to labels (B,), or to None for the unconditional estimate."""
    return lambda x, level, previous: denoiser(x, level, Given(labels, previous))


def with_weak(strong: Ask, weak: Denoiser, labels: Tensor | None) -> AskBoth:
    """Asks a strong and a weaker model, each with the same labels (B,)."""
    other = asking(weak, labels)
    return lambda x, level, previous: (strong(x, level, previous), other(x, level, previous).x0)


def with_unlabelled(denoiser: Denoiser, labels: Tensor) -> AskBoth:
    """Asks a model with labels (B,) and without them, in one batch."""
    both = torch.cat([labels, torch.full_like(labels, denoiser.conditioning.null_label)])

    def ask_both(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> tuple[Estimate, Tensor]:
        twice = level if level.t.ndim == 0 else level[torch.arange(len(x)).repeat(2)]
        before = None if previous is None else torch.cat([previous, previous])
        x0, weight, _ = denoiser(torch.cat([x, x]), twice, Given(both, before))
        strong, other = x0.chunk(2)
        return Estimate(strong, None if weight is None else weight.chunk(2)[0]), other

    return ask_both


def guided(guidance: Guidance, strong: Ask, both: AskBoth) -> Ask:
    """Guides the estimate inside the guidance's interval; outside it is the strong one itself."""
    last: Tensor | None = None

    def ask(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
        nonlocal last
        inside = guidance.inside(level)
        if not inside.any():
            return strong(x, level, previous)
        estimate, weak = both(x, level, previous)
        last = guidance.direction(estimate.x0 - weak, last)
        x0 = guidance.push(estimate.x0, last)
        if guidance.rescale:
            x0 = guidance.rescaled(x0, estimate.x0)
        if inside.ndim:  # each sample has its own level
            x0 = torch.where(broadcast(inside, x).bool(), x0, estimate.x0)
        return estimate._replace(x0=x0)

    return ask


def clipped(ask: Ask, limit: float) -> Ask:
    """Clamps the estimated x0 to [-limit, limit]."""

    def ask_clipped(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
        estimate = ask(x, level, previous)
        return estimate._replace(x0=estimate.x0.clamp(-limit, limit))

    return ask_clipped


def self_conditioned(ask: Ask) -> DenoiseFn:
    """Gives each call the x0 of the call before."""
    previous: Tensor | None = None

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        nonlocal previous
        estimate = ask(x, level, previous)
        previous = estimate.x0
        return estimate

    return denoise


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


def keep_known(denoise: DenoiseFn, known: Tensor, mask: Tensor) -> DenoiseFn:
    """Inpainting by replacement at sampling time (arXiv:2011.13456, section I.2).

    Where `mask`, broadcast to x, is true, the estimate is the clean image `known` (B, ...): a
    sampler then carries alpha known + sigma eps there, with its own noise, and ends on `known`. The
    paper replaces the state x with fresh noise instead; neither is an exact conditional.
    """

    def inpainted(x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x, level)
        return estimate._replace(x0=torch.where(mask, known, estimate.x0))

    return inpainted
