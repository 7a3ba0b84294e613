"""The algebra of x_t = alpha x0 + sigma eps; everything else is built from these formulas."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """A point, or a batch or path of points, on a noise schedule.

    `t` is in [0, 1], 0 = data and 1 = noise; all three have one shape: (), (B,) or (steps + 1,).
    `alpha` and `sigma` are float64, because 1 - alpha^2 cancels in float32. `there`, if given, is
    the level that the next step goes to, for denoisers that can jump.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    there: "NoiseLevel | None" = None

    @property
    def logsnr(self) -> Tensor:
        """2 log(alpha / sigma): +inf on clean data, -inf on pure noise."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def to(self, device: torch.device | str) -> "NoiseLevel":
        """The level on another device."""
        there = None if self.there is None else self.there.to(device)
        # a CPU's numbers are copied at once, so nothing has to wait for a GPU
        t, alpha, sigma = (
            each.to(device, non_blocking=True) for each in (self.t, self.alpha, self.sigma)
        )
        return NoiseLevel(t, alpha, sigma, there)

    def towards(self, there: "NoiseLevel") -> "NoiseLevel":
        """The level with the one that the next step goes to, of the same shape."""
        return replace(self, there=there)

    def then(self, later: "NoiseLevel") -> "NoiseLevel":
        """The path (n + m,) of these levels (n,) and later ones (m,)."""
        pairs = ((self.t, later.t), (self.alpha, later.alpha), (self.sigma, later.sigma))
        t, alpha, sigma = map(torch.cat, pairs)
        return NoiseLevel(t, alpha, sigma)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: int | slice | Tensor | None) -> "NoiseLevel":
        there = None if self.there is None else self.there[index]
        return NoiseLevel(self.t[index], self.alpha[index], self.sigma[index], there)


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """A number (), or one for each sample (B,), ready to multiply `x` (B, ...) in `x`'s dtype."""
    if value.ndim == 0:
        # a scalar takes part in x's dtype as it is, and from the CPU without waiting for a GPU
        return value
    value = value.to(device=x.device, dtype=x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """The noisy sample alpha x0 + sigma eps."""
    return broadcast(level.alpha, x0) * x0 + broadcast(level.sigma, x0) * eps


def noise_of(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The unit noise in x, (x - alpha x0) / sigma; the level must have sigma > 0."""
    return (x - broadcast(level.alpha, x) * x0) / broadcast(level.sigma, x)


def jump(x: Tensor, x0: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """Moves x from `here` to `there` with its noise kept: there.alpha x0 + there.sigma eps."""
    # eps is eliminated: two products, coefficients in float64, and on clean data exactly alpha x0
    ratio = there.sigma / here.sigma
    return broadcast(there.alpha - ratio * here.alpha, x) * x0 + broadcast(ratio, x) * x


def renoise(x: Tensor, here: NoiseLevel, there: NoiseLevel, noise: Tensor) -> Tensor:
    """Moves x forward to the noisier level `there` with fresh unit noise; needs here.alpha > 0."""
    ratio = there.alpha / here.alpha
    added = (there.sigma**2 - (ratio * here.sigma) ** 2).clamp(min=0).sqrt()
    return broadcast(ratio, x) * x + broadcast(added, x) * noise


def lowered(here: NoiseLevel, there: NoiseLevel, eta: float) -> tuple[NoiseLevel, Tensor, Tensor]:
    """Splits a step from `here` to the cleaner level `there`: a jump, then fresh noise.

    Returns the level to jump to, with there's alpha, and the small and the large variance of the
    noise. eta = 1 is q(x_there | x_here, x0) (arXiv:2006.11239), eta = 0 adds none, and between
    them lies DDIM's family with the same marginals (arXiv:2010.02502, equation 16). The variances
    have the level's shape and are float64: the small one is the posterior's own, the large one that
    of the forward step from `there` to `here`; both are times eta^2.
    """
    # forward step: x_here = ratio x_there + sqrt(large) z; the ratio form needs no beta(t)
    ratio = here.alpha / there.alpha
    large = eta**2 * (here.sigma**2 - (ratio * there.sigma) ** 2).clamp(min=0)
    small = large * (there.sigma / here.sigma) ** 2
    kept = (there.sigma**2 - small).clamp(min=0).sqrt()
    return NoiseLevel(there.t, there.alpha, kept), small, large


def features(position: Tensor, channels: int, device: torch.device) -> Tensor:
    """Cosines of a position (B,) of unit variance, (B, channels) float32."""
    position = position.to(device, torch.float32)
    # normal frequencies, with a deviation of one cycle, and uniform phases as in EDM2, but evenly
    # spaced and not drawn
    count = torch.arange(channels, device=device, dtype=torch.float32)
    frequency = torch.special.ndtri((count + 0.5) / channels)
    phase = count * (math.sqrt(5) - 1) / 2
    return math.sqrt(2) * (2 * math.pi * (position[:, None] * frequency + phase)).cos()
