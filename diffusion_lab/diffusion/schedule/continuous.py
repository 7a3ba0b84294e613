"""Schedules with a closed form; each inverts logSNR to t without cancellation."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_lab.common.ranges import above, at_least, number, ranges
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule.base import NoiseSchedule


class Rectified(NoiseSchedule):
    """The straight path alpha = 1 - t, sigma = t of rectified flow (arXiv:2209.03003).

    At t = 1 alpha is exactly 0, so eps prediction is impossible.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(torch.sigmoid(-logsnr.double() / 2))


class Cosine(NoiseSchedule):
    """alpha = cos(a) / cos(a0), alpha^2 + sigma^2 = 1, a linear in t, logSNR from 20 to -20.

    Without offset a0 = 0: a constant-speed walk on the circle (arXiv:2202.00512). With one, a0 is
    offset / (1 + offset) of a right angle, and small t are noisier (arXiv:2102.09672).

    The ends stop short of the axes: at cos(pi/2) = 6e-17 nothing would warn that eps prediction has
    a gain of 1e16. Here it is sigma/alpha = e^10 at t = 1, finite, so eps is allowed; as that still
    multiplies the network's errors by 22026, clip the estimates of eps models to [-1, 1].
    """

    @ranges(offset=at_least(0).as_in(0.008))
    def __init__(self, offset: float = 0.0):
        start = offset / (1 + offset) * math.pi / 2  # a0
        self.start, self.sin0, self.cos0 = start, math.sin(start), math.cos(start)
        small = math.exp(-10)  # sigma / alpha at logSNR 20, alpha / sigma at -20
        self.cleanest = self.angle(torch.tensor(small, dtype=torch.float64)).item()
        # a right angle less a, where alpha / sigma is small
        short = math.atan(self.cos0 * small / math.hypot(self.sin0 * small, 1))
        self.range = math.pi / 2 - start - (self.cleanest + short)

    def angle(self, ratio: Tensor) -> Tensor:
        """a - a0 at this sigma / alpha, from tan a = hypot(sin a0, ratio) / cos a0."""
        length = torch.hypot(torch.full_like(ratio, self.sin0), ratio)
        # the tangent of a difference, with length - sin a0 = ratio^2 / (length + sin a0)
        scale = self.cos0 / (self.cos0**2 + length * self.sin0)
        return (ratio * (ratio / (length + self.sin0)) * scale).atan()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.cleanest + self.range * t
        # cos^2 a0 - cos^2 a = sin(a - a0) sin(a + a0), where 1 - alpha^2 would cancel
        stretch = ((angle + 2 * self.start).sin() / angle.sin()).sqrt()  # exactly 1 without offset
        return (angle + self.start).cos() / self.cos0, angle.sin() * stretch / self.cos0

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        ratio = (-logsnr.double() / 2).clamp(-50, 50).exp()  # finite, and far beyond the ends
        return self(((self.angle(ratio) - self.cleanest) / self.range).clamp(0, 1))


class Linear(NoiseSchedule):
    """The variance-preserving SDE with beta(t) linear in t (arXiv:2011.13456, equation 33).

    log(alpha^2) = -t beta_min - t^2 (beta_max - beta_min) / 2, alpha^2 + sigma^2 = 1.
    """

    @ranges(beta_min=above(0), beta_max=above(0))
    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if beta_min > beta_max:
            raise ValueError(f"beta_min={beta_min} must be at most beta_max={beta_max}")
        self.beta_min = beta_min
        self.slope = beta_max - beta_min

    def log_alpha2(self, t: Tensor) -> Tensor:
        return -t * (self.beta_min + self.slope / 2 * t)

    def at_decay(self, decay: Tensor) -> NoiseLevel:
        """The levels where -log(alpha^2) is `decay`: the quadratic's root without a difference."""
        linear = self.beta_min / decay  # divided by the decay, so that 0 and inf work, too
        return self((2 / (linear + (linear**2 + 2 * self.slope / decay).sqrt())).clamp(0, 1))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha2 = self.log_alpha2(t)
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        # alpha^2 = sigmoid(logsnr); the default threshold of 20 would drop e^-20
        return self.at_decay(softplus(-logsnr.double(), threshold=700))


class SubVP(Linear):
    """The sub-VP SDE: the alpha of `Linear`, and sigma = 1 - alpha^2 (arXiv:2011.13456)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha2 = self.log_alpha2(t)
        return (log_alpha2 / 2).exp(), -torch.expm1(log_alpha2)

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha)
        ratio = (-logsnr.double() / 2).exp()
        return self.at_decay(2 * (ratio / 2).asinh())


class Sigmoid(NoiseSchedule):
    """alpha^2 falls as a stretch of the sigmoid, u from start/tau to end/tau (arXiv:2212.11972).

    alpha^2 = (S(end/tau) - S(u)) / (S(end/tau) - S(start/tau)), alpha^2 + sigma^2 = 1; the ends
    stop at logSNR 20 and -20, as in `Cosine`.
    """

    @ranges(start=number(), end=number(), tau=above(0))
    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0):
        if not start < end:
            raise ValueError(f"start={start} must be below end={end}")
        if not max(-start, end) <= 100 * tau:
            raise ValueError(
                f"tau={tau} must be at least a hundredth of start={start} and end={end}"
            )
        # S(x) - S(y) = sinh((x - y) / 2) / (2 cosh(x / 2) cosh(y / 2)) never cancels
        self.start, self.half = start / tau / 2, (end - start) / tau / 2
        self.cosh_start, self.cosh_end = math.cosh(self.start), math.cosh(end / tau / 2)
        extremes = torch.tensor([20.0, -20.0], dtype=torch.float64)
        self.cleanest = self.travelled(extremes)[0].item()  # (u - start / tau) / 2
        self.noisiest = self.remaining(extremes)[1].item()  # (end / tau - u) / 2
        self.range = self.half - self.cleanest - self.noisiest

    def travelled(self, logsnr: Tensor) -> Tensor:
        """(u - start/tau) / 2 = w at this logSNR, from sinh(half - w) / sinh(w) = odds."""
        odds = logsnr.exp() * (self.cosh_end / self.cosh_start)
        return torch.log1p(2 * math.sinh(self.half) / (math.exp(-self.half) + odds)) / 2

    def remaining(self, logsnr: Tensor) -> Tensor:
        """(end/tau - u) / 2 = half - w at this logSNR, without the difference."""
        odds = (-logsnr).exp() * (self.cosh_start / self.cosh_end)
        return torch.log1p(2 * math.sinh(self.half) / (math.exp(-self.half) + odds)) / 2

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        travelled = self.cleanest + self.range * t
        remaining = self.noisiest + self.range * (1 - t)
        scale = math.sinh(self.half) * (self.start + travelled).cosh()
        alpha2 = remaining.sinh() * self.cosh_start / scale
        return alpha2.sqrt(), (travelled.sinh() * self.cosh_end / scale).sqrt()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(((self.travelled(logsnr.double()) - self.cleanest) / self.range).clamp(0, 1))


class VarianceExploding(NoiseSchedule):
    """alpha = 1 and sigma geometric in t (arXiv:2011.13456).

    The default range is EDM's (arXiv:2206.00364), for images in [-1, 1].
    """

    @ranges(sigma_min=above(0), sigma_max=above(0))
    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min={sigma_min} must be below sigma_max={sigma_max}")
        self.log_min = math.log(sigma_min)
        self.log_range = math.log(sigma_max / sigma_min)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), (self.log_min + self.log_range * t).exp()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(((-logsnr.double() / 2 - self.log_min) / self.log_range).clamp(0, 1))
