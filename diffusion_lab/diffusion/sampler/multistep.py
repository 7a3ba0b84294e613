"""Multistep samplers: one network call a step, sharpened by the estimates of earlier calls.

A jump takes one x0. Where x0 changes along the step, from 0 to 1 in half logSNR over a rise of h,
the exact jump takes the mean of its polynomial under the weight h exp(h r) / (exp(h) - 1), whose
moments are all that these rules need (arXiv:2211.01095, arXiv:2302.04867).
"""

import math
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Count, Fraction, settings, whole
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, jump, noise_of
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.single_step import ancestral_step
from diffusion_lab.diffusion.sampler.time_grid import BY_RHO, TimeGrid

# Adams and Bashforth's weights for equal steps, newest first
ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def moments(h: float, n: int) -> list[float]:
    """The first n moments of the place r in a step of half logSNR h, by parts from M_0 = 1."""
    found = [1.0]
    for k in range(1, n + 1):
        found.append(-1 / math.expm1(-h) - k / h * found[-1])
    return found[1:]


def shares(gaps: list[float], h: float) -> list[float]:
    """The shares of estimates in the mean of the polynomial through them and the newest one.

    `gaps` are their distances to the newest in units of the step, of h in half logSNR, and below 0
    for earlier ones. The mean is newest + the sum of share / gap (estimate - newest).
    """
    powers = [[gap**k for gap in gaps] for k in range(len(gaps))]
    return torch.linalg.solve(
        torch.tensor(powers, dtype=torch.float64),
        torch.tensor(moments(h, len(gaps)), dtype=torch.float64),
    ).tolist()


def order_at(i: int, levels: NoiseLevel, order: int) -> int:
    """The order of the step from levels[i]: the number of known estimates, and 1 to clean data.

    It falls one by one towards clean data, as large steps in logSNR there extrapolate badly
    (arXiv:2211.01095). Pure noise, where logSNR is infinite, cannot be extrapolated from.
    """
    known = i + 1 - int(levels[0].alpha == 0)
    left = len(levels) - 1 - i if levels[-1].sigma == 0 else order
    return max(1, min(order, known, left))


@settings
class DPMSolver(Sampler):
    """DPM-Solver++ of order 1 to 3, multistep, with x0 extrapolated (arXiv:2211.01095).

    eta = 0 is the ODE; eta = 1 is the SDE, at order 2 SDE-DPM-Solver++(2M). `curvature` is the
    share of the quadratic's last term that order 3 takes. 1/2 is what the authors' code and
    diffusers do: more accurate at up to 25 steps on Gaussian mixtures, but of second order; only
    with 1 is it of third.
    """

    steps: Count = 20

    order: Annotated[int, whole(1, 3)] = 2
    eta: Fraction = 0.0
    curvature: Fraction = 0.5

    def __post_init__(self) -> None:
        if self.order == 3 and self.eta > 0:
            raise ValueError(
                f"order=3 works for the ODE only; use order=2 with eta={self.eta}, or eta=0"
            )

    def walk(self, denoise, x, levels, schedule, randn_like):
        gaps = (levels.logsnr.diff() / 2).tolist()  # infinite from pure noise, and to clean data
        known: list[Tensor] = []  # newest first
        for i, (here, there) in enumerate(pairwise(levels)):
            known = [denoise(x, here).x0, *known][: self.order]
            ahead = self.extrapolate(known[: order_at(i, levels, self.order)], gaps[: i + 1])
            x = ancestral_step(x, Estimate(ahead), here, there, randn_like, self.eta)
            yield x

    def extrapolate(self, known: list[Tensor], gaps: list[float]) -> Tensor:
        """The x0 to jump with over the last of the gaps, from the estimates before it."""
        if len(known) == 1:
            return known[0]
        h = gaps[-1]
        last = gaps[-2] / h
        slope = (known[0] - known[1]) / last
        if len(known) == 2:
            return known[0] + slope / 2  # the midpoint, which the moment tends to
        before = gaps[-3] / h
        curve = (slope - (known[1] - known[2]) / before) / (last + before)
        mean, square = moments(h, 2)
        return known[0] + mean * (slope + last * curve) + self.curvature * square * curve


@settings
class UniPC(Sampler):
    """Unified predictor-corrector of order 1 to 3, B(h) = e^h - 1 (arXiv:2302.04867).

    Each network call first corrects the state that it was made at, and then predicts the next; so
    the order of convergence is one more than `order`, at one call a step.
    """

    steps: Count = 20

    order: Annotated[int, whole(1, 3)] = 2

    def walk(self, denoise, x, levels, schedule, randn_like):
        places = (levels.logsnr / 2).tolist()
        known: list[Tensor] = []  # newest first
        start, order = x, 1
        for i, (here, there) in enumerate(pairwise(levels)):
            x0 = denoise(x, here).x0
            if i > 0:  # the last step again, with this estimate among those that it knows
                blend = self.blend(known[:order], places[: i + 1], x0)
                x = jump(start, blend, levels[i - 1], here)
            known = [x0, *known][: self.order]
            order = order_at(i, levels, self.order)
            start = x
            x = jump(x, self.blend(known[:order], places[: i + 2]), here, there)
            yield x

    def blend(self, known: list[Tensor], places: list[float], end: Tensor | None = None) -> Tensor:
        """The x0 to jump with to the last of the places: polynomial in half logSNR.

        It goes through the known estimates, the newest at the last place but one, and through the
        one at the step's end, where that is given.
        """
        h = places[-1] - places[-2]
        others = [
            ((place - places[-2]) / h, x0)
            for place, x0 in zip(places[-3::-1], known[1:], strict=False)
        ]
        if end is not None:
            others.append((1.0, end))
        # for one, 0.5 is the paper's choice, which the moment tends to; h may be infinite
        weights = [0.5] if len(others) < 2 else shares([r for r, _ in others], h)
        x0 = known[0]
        for weight, (r, other) in zip(weights, others, strict=False):
            x0 = x0 + weight / r * (other - known[0])
        return x0


@settings
class DEIS(Sampler):
    """Exponential integrator with eps extrapolated in log(sigma / alpha) (arXiv:2204.13902).

    With x / alpha a function of sigma / alpha, the ODE is d(x / alpha) = eps d(sigma / alpha), so a
    step takes the mean of eps's polynomial: of order 1 it is `Euler`, and of order k it converges
    with k. The polynomial is in the logarithm, as in diffusers; the paper's tAB is one in t.
    """

    steps: Count = 10

    order: Annotated[int, whole(1, 3)] = 3

    def walk(self, denoise, x, levels, schedule, randn_like):
        places = (levels.logsnr / 2).tolist()
        known: list[Tensor] = []  # eps, newest first
        for i, (here, there) in enumerate(pairwise(levels)):
            x0 = denoise(x, here).x0
            known = [noise_of(x, x0, here), *known][: self.order]
            x = jump(x, x0, here, there)
            earlier = known[1 : order_at(i, levels, self.order)]
            if earlier:  # so here.alpha > 0
                h = places[i + 1] - places[i]
                gaps = [(places[i - k] - places[i]) / h for k in range(1, len(earlier) + 1)]
                rise = there.sigma - there.alpha / here.alpha * here.sigma
                # sigma / alpha is exp(-half logSNR), so its weight is that of -h
                for share, gap, eps in zip(shares(gaps, -h), gaps, earlier, strict=True):
                    x = x + broadcast(share / gap * rise, x) * (eps - known[0])
            yield x


@settings
class IPNDM(Sampler):
    """Adams-Bashforth on eps over sigma / alpha, weights of equal steps (arXiv:2204.13902).

    As no grid in use is uniform in sigma / alpha, its order of convergence is 2 for `order` 2 to 4,
    yet it is often the most accurate at 5 to 10 steps. Its order grows from 1.
    """

    steps: Count = 10
    time_grid: TimeGrid = BY_RHO

    order: Annotated[int, whole(1, 4)] = 4

    def walk(self, denoise, x, levels, schedule, randn_like):
        known: list[Tensor] = []  # newest first
        for here, there in pairwise(levels):
            x0 = denoise(x, here).x0
            eps = noise_of(x, x0, here)
            known = [eps, *known][: self.order]
            x = jump(x, x0, here, there)
            if len(known) > 1:  # so here.alpha > 0: only the first level can be pure noise
                weights = ADAMS[len(known) - 1]
                change = sum(w * e for w, e in zip(weights, known, strict=True)) - eps
                rise = there.sigma - there.alpha / here.alpha * here.sigma
                x = x + broadcast(rise, x) * change
            yield x
