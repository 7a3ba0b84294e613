"""Guidance: what sits between the denoiser and the sampler, x0 = weak + scale (strong - weak)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast

TINY = 1e-12  # where an estimate is constant or 0, there is nothing to divide by


class Guidance:
    """Guidance of x0, all channels alike, away from a weaker estimate.

    The weak estimate is the unconditional model's (classifier-free, arXiv:2207.12598), or that of
    a smaller or earlier run, `weak_run`, with the same labels (autoguidance, arXiv:2406.02507).
    scale 1 is exactly the model itself and 0 exactly the weak one, in one network call; any other
    scale takes both inside `interval`, a range of sigma / alpha (arXiv:2404.07724), and the model
    itself outside. `rescale` in [0, 1] moves the result's standard deviation to the model's own
    (arXiv:2305.08891). `clip`, if given, clamps x0 to [-clip, clip]: 1 for images in [-1, 1] is
    DDPM's clip_denoised.
    """

    def __init__(
        self,
        scale: float = 1.0,
        interval: Sequence[float] = (0.0, math.inf),
        rescale: float = 0.0,
        clip: float | None = None,
        weak_run: str | None = None,
    ):
        if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
            raise ValueError(
                f"guidance.interval={list(interval)} must be two values of sigma / alpha, "
                "the lower one first, as in [0.2,5]"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale={rescale} must be in [0, 1]; 0 is off")
        if clip is not None and clip <= 0:
            raise ValueError(f"guidance.clip={clip} must be above 0, or null for no clipping")
        self.scale = scale
        self.low, self.high = interval
        self.rescale = rescale
        self.clip = clip
        self.weak_run = weak_run

    def direction(self, difference: Tensor, last: Tensor | None) -> Tensor:
        """Where to push, from strong - weak (B, ...) and the direction of the call before."""
        return difference

    def push(self, strong: Tensor, direction: Tensor) -> Tensor:
        """The guided x0 (B, ...), not yet rescaled."""
        return strong + (self.scale - 1) * direction

    def rescaled(self, guided: Tensor, strong: Tensor) -> Tensor:
        """`guided` with its standard deviation moved towards that of `strong`, sample by sample."""
        axes = tuple(range(1, strong.ndim))
        ratio = strong.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=TINY)
        return guided * (1 + self.rescale * (ratio - 1))

    def inside(self, level: NoiseLevel) -> Tensor:
        """Whether sigma / alpha is in the interval, of the level's shape."""
        ratio = level.sigma / level.alpha
        return (self.low <= ratio) & (ratio <= self.high)

    def bind(
        self, denoiser: Denoiser, labels: Tensor | None, weak: Denoiser | None = None
    ) -> DenoiseFn:
        """The function that one walk of a sampler calls, for these labels (B,) int64 or None.

        `weak` is the denoiser of `weak_run`. What a walk remembers (self-conditioning's last
        estimate, a direction's momentum) lives in this function, so each walk binds anew.
        """
        if weak is None and self.weak_run is not None:
            raise ValueError("guidance.weak_run needs its denoiser: bind(denoiser, labels, weak)")
        unlabelled = labels is None or not denoiser.conditioning.conditional
        if weak is None and self.scale not in (0, 1) and unlabelled:
            raise ValueError(
                f"guidance.scale={self.scale} needs a model trained on labels; "
                "use guidance=none with an unconditional one"
            )
        previous: Tensor | None = None  # x0 of the call before, for self-conditioning
        last: Tensor | None = None

        def ask(model: Denoiser, x: Tensor, level: NoiseLevel, labels: Tensor | None) -> Estimate:
            if not model.self_conditioning or previous is None:
                return model(x, level, labels)
            return model(x, level, labels, torch.cat([previous] * (len(x) // len(previous))))

        def strong_and_weak(x: Tensor, level: NoiseLevel) -> tuple[Estimate, Tensor]:
            if weak is not None:
                return ask(denoiser, x, level, labels), ask(weak, x, level, labels).x0
            null = torch.full_like(labels, denoiser.conditioning.null_label)
            twice = level if level.t.ndim == 0 else level[torch.arange(len(x)).repeat(2)]
            x0, variance = ask(denoiser, torch.cat([x, x]), twice, torch.cat([labels, null]))
            strong, other = x0.chunk(2)
            return Estimate(strong, None if variance is None else variance.chunk(2)[0]), other

        def guided(x: Tensor, level: NoiseLevel) -> Estimate:
            nonlocal last
            if self.scale == 0:
                return (
                    ask(denoiser, x, level, None) if weak is None else ask(weak, x, level, labels)
                )
            inside = self.inside(level)
            if self.scale == 1 or not inside.any():
                return ask(denoiser, x, level, labels)
            strong, other = strong_and_weak(x, level)
            last = self.direction(strong.x0 - other, last)
            x0 = self.push(strong.x0, last)
            if self.rescale:
                x0 = self.rescaled(x0, strong.x0)
            if inside.ndim:  # each sample is at a level of its own
                x0 = torch.where(broadcast(inside, x).bool(), x0, strong.x0)
            return strong._replace(x0=x0)

        def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
            nonlocal previous
            estimate = guided(x, level)
            if self.clip is not None:
                estimate = estimate._replace(x0=estimate.x0.clamp(-self.clip, self.clip))
            previous = estimate.x0
            return estimate

        return denoise


class ProjectedGuidance(Guidance):
    """Adaptive projected guidance (arXiv:2410.02416): a direction that saturates less.

    Of the difference between both estimates the part along the strong one is kept by a share of
    `parallel` only; `norm_limit`, if given, bounds the difference's length; `momentum`, negative
    for the paper's reverse momentum, adds that share of the direction before.
    parallel = 1 without limit and momentum is classifier-free guidance.
    """

    def __init__(
        self,
        scale: float = 1.0,
        interval: Sequence[float] = (0.0, math.inf),
        rescale: float = 0.0,
        clip: float | None = None,
        weak_run: str | None = None,
        parallel: float = 0.0,
        norm_limit: float | None = None,
        momentum: float = 0.0,
    ):
        super().__init__(scale, interval, rescale, clip, weak_run)
        if norm_limit is not None and norm_limit <= 0:
            raise ValueError(f"guidance.norm_limit={norm_limit} must be above 0, or null")
        if not -1 < momentum < 1:
            raise ValueError(f"guidance.momentum={momentum} must be between -1 and 1; 0 is off")
        self.parallel = parallel
        self.norm_limit = norm_limit
        self.momentum = momentum

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
