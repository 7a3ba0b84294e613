"""Noise schedules: t in [0, 1] -> (alpha, sigma) in x_t = alpha x0 + sigma eps.

Schedules with a closed form invert logSNR to t without cancellation; a table of N levels has index
i at t = (i + 1) / N, and clean data at t = 0; others are made from another schedule.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_lab.common.ranges import above, at_least, inside, number, ranges, whole
from diffusion_lab.diffusion.noise import NoiseLevel


class NoiseSchedule(ABC):
    """A path from data (t = 0) to noise (t = 1), along which logSNR falls strictly."""

    discrete_steps: int | None = None  # points of the table, where the schedule has one

    @property
    def explodes(self) -> bool:
        """Whether sigma exceeds 1 at t = 1, as on variance-exploding schedules."""
        return bool(self(torch.ones(())).sigma > 1 + 1e-6)

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, a float64 tensor of any shape; both of t's shape."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The levels at t in [0, 1], of t's shape and on its device."""
        t = t.to(torch.float64)  # 1 - alpha^2 cancels in float32
        return NoiseLevel(t, *self.coefficients(t))

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        """The levels of this logSNR, of its shape; beyond the schedule's ends, the nearer end."""
        # bisection to 2^-60: schedules with a closed form override this
        low = torch.zeros_like(logsnr, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(60):
            middle = (low + high) / 2
            too_clean = self(middle).logsnr > logsnr
            low = torch.where(too_clean, middle, low)
            high = torch.where(too_clean, high, middle)
        return self(high)


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


class Table(NoiseSchedule):
    """alpha^2 = product of (1 - beta) over the steps so far, alpha^2 + sigma^2 = 1.

    Between its points log(alpha^2) is linear in t, so alpha and sigma are defined on all of [0, 1]
    and any time grid may be used.
    """

    discrete_steps: int

    def __init__(self, betas: Tensor):
        self.discrete_steps = len(betas)
        # log(alpha^2) at t = 0, 1/N, ..., 1                       (N + 1,)
        self.log_alpha2 = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.log_alpha2.to(t.device, non_blocking=True)
        position = t * self.discrete_steps
        index = position.long().clamp(0, self.discrete_steps - 1)
        log_alpha2 = torch.lerp(table[index], table[index + 1], position - index)
        # 1 - alpha^2 cancels near t = 0
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        rising = -self.log_alpha2.to(logsnr.device, non_blocking=True)
        # alpha^2 = sigmoid(logsnr); the default threshold of 20 would drop e^-20
        wanted = softplus(-logsnr.double(), threshold=700)
        index = torch.searchsorted(rising, wanted).clamp(1, self.discrete_steps) - 1
        beyond = (wanted - rising[index]) / (rising[index + 1] - rising[index])
        return self(((index + beyond) / self.discrete_steps).clamp(0, 1))


class DDPMLinear(Table):
    """N steps whose betas grow linearly (arXiv:2006.11239).

    beta_start and beta_end are for 1000 steps; other tables have 1000 / N times as much per
    step, the rule of arXiv:2102.09672's code, and so end at about the same noise.
    """

    @ranges(steps=whole(1), beta_start=inside(0, 1), beta_end=inside(0, 1))
    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        first, last = beta_range(steps, beta_start, beta_end)
        super().__init__(torch.linspace(first, last, steps, dtype=torch.float64))


class DDPMScaledLinear(Table):
    """N steps whose betas' square roots grow linearly, Stable Diffusion's (arXiv:2112.10752).

    beta_start and beta_end are for 1000 steps, as in `DDPMLinear`.
    """

    @ranges(steps=whole(1), beta_start=inside(0, 1), beta_end=inside(0, 1))
    # latent diffusion's unconditional recipes use 0.0015 and 0.0195
    def __init__(self, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        first, last = beta_range(steps, beta_start, beta_end)
        super().__init__(torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2)


class DDPMCosine(Table):
    """N steps of alpha^2 = cos^2((t + offset) / (1 + offset) pi/2) / cos^2(a0) (arXiv:2102.09672).

    The last betas are capped at max_beta, so some signal is left at t = 1: at N = 1000 alpha is
    4.9e-5. Nothing is scaled with N.
    """

    @ranges(steps=whole(1), offset=at_least(0).as_in(0.008), max_beta=inside(0, 1))
    def __init__(self, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999):
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        angle = (t + offset) / (1 + offset) * (math.pi / 2)
        here, there = angle[:-1], angle[1:]
        # 1 - cos^2(there) / cos^2(here) would cancel
        betas = (there - here).sin() * (there + here).sin() / here.cos() ** 2
        super().__init__(betas.clamp(max=max_beta))


def beta_range(steps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """The first and last beta of a table of N, from the values for a table of 1000."""
    if beta_start > beta_end:
        raise ValueError(f"beta_start={beta_start} must be at most beta_end={beta_end}")
    fewest = math.floor(round(1000 * beta_end, 9)) + 1
    if steps < fewest:
        raise ValueError(
            f"steps={steps} is too few for beta_end={beta_end}, which is defined for "
            f"1000 steps: {steps} steps would need a beta of {beta_end * 1000 / steps:.4g}; use "
            f"{fewest} or more, or a smaller beta_end"
        )
    return beta_start * (1000 / steps), beta_end * (1000 / steps)


# for each path, the function of alpha and sigma that is 1 along it
PATHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight": torch.add,
    "exploding": lambda alpha, sigma: alpha,
    "preserving": torch.hypot,
}


def follows(schedule: NoiseSchedule, path: str) -> bool:
    """Whether the middle of a schedule lies on this path."""
    middle = schedule(torch.tensor(0.5))
    return abs(PATHS[path](middle.alpha, middle.sigma).item() - 1) < 1e-9


class ZeroTerminalSNR(NoiseSchedule):
    """alpha shifted and stretched to reach exactly 0 at t = 1 (arXiv:2305.08891, algorithm 1).

    alpha' = (alpha - alpha(1)) / (1 - alpha(1)); eps prediction becomes impossible.
    """

    def __init__(self, schedule: NoiseSchedule):
        if not follows(schedule, "preserving"):
            raise ValueError(
                "schedule must be variance-preserving (alpha^2 + sigma^2 = 1), such as ddpm_linear "
                "or cosine"
            )
        self.schedule = schedule
        self.discrete_steps = schedule.discrete_steps
        self.terminal = schedule(torch.tensor(1.0)).alpha.item()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        kept = 1 - self.terminal
        noise = sigma**2 / ((1 + alpha) * kept)  # 1 - alpha', without the difference
        alpha = (alpha - self.terminal) / kept
        # exp may round differently in a vector than alone, and then t = 1 would just miss 0
        end = t == 1
        sigma = (noise * (1 + alpha)).sqrt().masked_fill(end, 1.0)
        return alpha.masked_fill(end, 0.0), sigma

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        logsnr = logsnr.double()
        alpha = logsnr.sigmoid().sqrt()
        noise = (-logsnr).sigmoid() / (1 + alpha) * (1 - self.terminal)  # 1 - inner alpha
        inner = self.terminal + (1 - self.terminal) * alpha
        t = self.schedule.at_logsnr(2 * inner.log() - (noise * (1 + inner)).log()).t
        return self(t.masked_fill(alpha == 0, 1.0))


class Shifted(NoiseSchedule):
    """sigma / alpha times `shift`, on the same path: more noise for larger images.

    logSNR falls by 2 log(shift) everywhere (arXiv:2301.11093). On the straight path this is
    t' = shift t / (1 + (shift - 1) t) (arXiv:2403.03206).
    """

    @ranges(shift=above(0))
    def __init__(self, schedule: NoiseSchedule, shift: float = 3.0):
        paths = [length for name, length in PATHS.items() if follows(schedule, name)]
        if not paths:
            raise ValueError(
                "schedule must have alpha + sigma = 1, alpha^2 + sigma^2 = 1 or alpha = 1, such as "
                "rectified, cosine or edm"
            )
        self.schedule = schedule
        self.discrete_steps = schedule.discrete_steps
        self.shift = shift
        self.length = paths[0]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        sigma = self.shift * sigma
        length = self.length(alpha, sigma)
        return alpha / length, sigma / length

    def at_logsnr(self, logsnr: Tensor) -> NoiseLevel:
        return self(self.schedule.at_logsnr(logsnr.double() + 2 * math.log(self.shift)).t)
