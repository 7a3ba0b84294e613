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
LabelLikelihood = Callable[[Tensor, Tensor], Tensor]  # x0, labels (B,) -> log p(label | x0), (B,)
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
    DDPM's clip_denoised. With a `percentile`, the limit of a sample is this share of its own |x0|
    where that is larger, and x0 is then scaled back to clip: dynamic thresholding
    (arXiv:2205.11487).
    """

    keeps_weak_noise = False  # whether a step keeps the noise of the weak estimate
    by_classifier = False  # whether a classifier guides, for which every sample needs a label
    told_scale = False  # whether the network is told the scale, and guides itself

    scale: Number = 1.0
    interval: Annotated[Sequence[float], INTERVAL] = (0.0, math.inf)
    rescale: Fraction = 0.0
    clip: Annotated[float | None, optional(above(0))] = None
    percentile: Annotated[float | None, optional(inside(0, 1).as_in(0.995))] = None
    weak_run: str | None = None

    def __post_init__(self) -> None:
        if self.percentile is not None and self.clip is None:
            raise ValueError(
                f"percentile={self.percentile} needs clip, the limit of clean data; write clip=1 "
                "for images"
            )

    @property
    def uses_strong(self) -> bool:
        """Whether the strong estimate counts."""
        return self.scale != 0

    @property
    def uses_weak(self) -> bool:
        """Whether the weak estimate counts."""
        return self.scale != 1

    @property
    def asks_unlabelled(self) -> bool:
        """Whether the weak estimate is the same model's without labels."""
        return self.weak_run is None and self.uses_weak

    @property
    def needs_labels(self) -> bool:
        """Whether estimates with labels and without them both count."""
        return self.asks_unlabelled and self.uses_strong

    def against(self, x: Tensor, level: NoiseLevel, strong: Tensor, weak: Tensor) -> Tensor:
        """The x0 (B, ...) to push away from, given both estimates for x at `level`."""
        return weak

    def direction(self, difference: Tensor, last: Tensor | None) -> Tensor:
        """Returns where to push, from the difference (B, ...) and the last call's direction."""
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

    def clamped(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) within the limit of clean data, if there is one."""
        if self.clip is None:
            return x0
        if self.percentile is None:
            return x0.clamp(-self.clip, self.clip)
        # sample by sample, as torch's quantile is limited to 16 million numbers
        share = self.percentile
        reach = torch.stack([each.abs().flatten().quantile(share) for each in x0])
        reach = broadcast(reach.clamp(min=self.clip), x0)
        return x0.clamp(-reach, reach) * (self.clip / reach)

    def bind(
        self,
        denoiser: Denoiser,
        labels: Tensor | None,
        weak: Denoiser | None = None,
        classifier: LabelLikelihood | None = None,
    ) -> DenoiseFn:
        """The function that one walk of a sampler calls, for these labels (B,) int64 or None.

        `weak` is the denoiser of `weak_run`, and `classifier` the one that guides, if any does.
        What a walk remembers (self-conditioning's last estimate, a direction's momentum) lives in
        this function, so each walk binds anew.
        """
        if weak is None and self.weak_run is not None:
            raise ValueError("weak_run needs its denoiser: bind(denoiser, labels, weak)")
        ask, previous = self.ask(denoiser, labels, weak, classifier), None

        def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
            nonlocal previous
            estimate = ask(x, level, previous)
            estimate = estimate._replace(x0=self.clamped(estimate.x0))
            previous = estimate.x0
            return estimate

        return denoise

    def ask(
        self,
        denoiser: Denoiser,
        labels: Tensor | None,
        weak: Denoiser | None,
        classifier: LabelLikelihood | None,
    ) -> Ask:
        """The guided estimate, not yet clamped."""
        strong = asking(denoiser, labels)
        if not self.uses_strong:
            return asking(denoiser, None) if weak is None else asking(weak, labels)
        if not self.uses_weak:
            return strong
        if weak is not None:
            other = asking(weak, labels)
            return guided(self, strong, lambda *asked: (strong(*asked), other(*asked).x0))
        if labels is None or not denoiser.conditioning.conditional:
            raise ValueError(
                f"scale={self.scale} needs a model trained on labels; use 1 for no guidance"
            )
        return guided(self, strong, with_unlabelled(denoiser, labels))

    def settled(self, x0: Tensor, strong: Tensor, inside: Tensor) -> Tensor:
        """The guided x0 (B, ...), rescaled, and only inside the interval."""
        if self.rescale:
            x0 = self.rescaled(x0, strong)
        return where(inside, x0, strong)


def where(inside: Tensor, guided: Tensor, otherwise: Tensor) -> Tensor:
    """The `guided` samples (B, ...) inside the interval, if each has its own level, or all."""
    return (
        torch.where(broadcast(inside, guided).bool(), guided, otherwise) if inside.ndim else guided
    )


def asking(denoiser: Denoiser, labels: Tensor | None) -> Ask:
    """Binds a denoiser to labels (B,), or to None for the unconditional estimate."""
    return lambda x, level, previous: denoiser(x, level, Given(labels, previous))


def with_unlabelled(denoiser: Denoiser, labels: Tensor) -> AskBoth:
    """Asks a model with labels (B,) and without them, in one batch."""
    both = torch.cat([labels, denoiser.conditioning.labels.null(len(labels), labels.device)])

    def ask_both(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> tuple[Estimate, Tensor]:
        twice = level if level.t.ndim == 0 else level[torch.arange(len(x)).repeat(2)]
        before = None if previous is None else torch.cat([previous, previous])
        estimate = denoiser(torch.cat([x, x]), twice, Given(both, before))
        weight, (strong, other) = estimate.log_variance_weight, estimate.x0.chunk(2)
        return Estimate(strong, None if weight is None else weight.chunk(2)[0]), other

    return ask_both


def guided(guidance: Guidance, alone: Ask, both: AskBoth) -> Ask:
    """Guides the strong estimate inside the guidance's interval; outside it is `alone`."""
    last: Tensor | None = None

    def ask(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
        nonlocal last
        inside = guidance.inside(level)
        if not inside.any():
            return alone(x, level, previous)
        estimate, weak = both(x, level, previous)
        strong = estimate.x0
        moved = guidance.direction(strong - guidance.against(x, level, strong, weak), last)
        x0 = guidance.settled(guidance.push(strong, moved), strong, inside)
        before = torch.zeros_like(moved) if last is None else last
        # a sample outside of the interval remembers nothing of this call, as if it were alone
        last = where(inside, moved, before)
        if not guidance.keeps_weak_noise:
            return estimate._replace(x0=x0)
        return estimate._replace(x0=x0, noise_x0=where(inside, weak, strong))

    return ask
