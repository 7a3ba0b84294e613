"""Samplers that follow the score through noise: the reverse SDE and Langevin dynamics.

score = (alpha x0 - x) / sigma^2 = -eps / sigma at every level.
"""

from itertools import pairwise
from typing import Annotated

from torch import Tensor

from diffusion_lab.common.ranges import Count, above, at_least, inside, one_of, settings, whole
from diffusion_lab.diffusion.noise import NoiseLevel, jump, noise_of
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.single_step import Variance, ancestral_step
from diffusion_lab.diffusion.sampler.time_grid import EVEN_LOGSNR, TimeGrid


@settings
class ReverseSDE(Sampler):
    """The reverse SDE of any schedule (arXiv:2011.13456), solved exactly for a constant x0.

    dx = x0 d(alpha) + eps d(sigma) - eta^2/2 sigma eps d(logsnr) + eta sigma sqrt(d(logsnr)) z.
    eta = 1 is the reverse of the forward SDE, eta = 0 the ODE, and a larger eta exchanges more
    noise; all share their marginals. With x0 kept over a step, eps follows an Ornstein-Uhlenbeck
    process, so a step of any length leaves the level's own noise:
    x' = alpha' x0 + sigma' (k eps + sqrt(1 - k^2) z) with k = exp(-eta^2/2 (logsnr' - logsnr)).
    The error is of first order. At eta = 0 this is `Euler`, and at eta = 1 `Ancestral` with the
    small variance, which is SDE-DPM-Solver++ of order 1 (arXiv:2211.01095).
    """

    steps: Count = 250
    time_grid: TimeGrid = EVEN_LOGSNR

    one_jump = True

    eta: Annotated[float, at_least(0)] = 1.0

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            # exp(-(logsnr' - logsnr) / 2), which is 0 from pure noise and to clean data
            decay = here.alpha * there.sigma / (here.sigma * there.alpha)
            kept = decay**self.eta**2
            left = NoiseLevel(there.t, there.alpha, kept * there.sigma)
            x = denoise(x, here).jump(x, here, left)
            if kept < 1 and there.sigma > 0:
                x = x + there.sigma * (1 - kept**2).sqrt() * randn_like(x)
            yield x


def langevin(x: Tensor, eps: Tensor, here: NoiseLevel, size: float | Tensor, z: Tensor) -> Tensor:
    """x + e score + sqrt(2 e) z with e = size sigma^2: one update of x (B, ...) at its level."""
    return x + here.sigma * ((2 * size) ** 0.5 * z - size * eps)


@settings
class AnnealedLangevin(Sampler):
    """Langevin dynamics at one level after the other (arXiv:1907.05600, arXiv:2006.09011).

    Each of the `corrections` at a level is x += e score + sqrt(2 e) z, e = step_size sigma^2;
    between levels x / alpha is kept. The end is one denoised estimate. The defaults are NCSNv2's
    for CIFAR-10, where step_size is epsilon / sigma_L^2 = 6.2e-6 / 0.01^2; separate modes get their
    weights right with more and larger updates only. Network calls: steps corrections + 1.
    """

    steps: Count = 232
    time_grid: TimeGrid = EVEN_LOGSNR

    corrections: Count = 5
    step_size: Annotated[float, inside(0, 2)] = 0.062

    def walk(self, denoise, x, levels, schedule, randn_like):
        here = levels[0]
        for left, there in zip(reversed(range(len(levels) - 1)), levels[:-1], strict=True):
            # x / alpha is kept; noise alone, where alpha is 0, is scaled to its new level
            x = x * (there.alpha / here.alpha if here.alpha > 0 else there.sigma / here.sigma)
            here = there
            for _ in range(self.corrections):
                eps = noise_of(x, denoise(x, here).x0, here)
                x = langevin(x, eps, here, self.step_size, randn_like(x))
            if left == 0:
                x = jump(x, denoise(x, here).x0, here, levels[-1])
            yield x


@settings
class PredictorCorrector(Sampler):
    """Langevin corrections of x, then an ancestral step, at every level (arXiv:2011.13456, alg. 4).

    A correction is x += e score + sqrt(2 e) z, of a length set by the signal-to-noise ratio `snr`:
    with corrector=langevin e = 2 f (snr |z| / |score|)^2, and with annealed e = 2 f (snr sigma)^2;
    f is the step's 1 - beta, which is 1 where alpha = 1, and 0 on pure noise. The norms are of one
    sample, where the paper takes their mean over the batch; so a sample does not depend on the
    others, and its spread is too large by a share of about 1 / D in D dimensions.
    On a variance-exploding schedule variance=fixed_large is the paper's reverse diffusion predictor
    and fixed_small its ancestral one. Network calls: steps (corrections + 1).
    """

    steps: Count = 250
    time_grid: TimeGrid = EVEN_LOGSNR

    snr: Annotated[float, above(0).as_in(0.16)] = 0.16
    corrections: Annotated[int, whole(0)] = 1
    corrector: Annotated[str, one_of("langevin", "annealed")] = "langevin"
    variance: Variance = "fixed_large"

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            kept = (here.alpha / there.alpha) ** 2
            for _ in range(self.corrections):
                eps, z = noise_of(x, denoise(x, here).x0, here), randn_like(x)
                size = 2 * kept * self.snr**2 * self.noise_power(z, eps)
                x = langevin(x, eps, here, size, z)
            x = ancestral_step(x, denoise(x, here), here, there, randn_like, 1.0, self.variance)
            yield x

    def noise_power(self, z: Tensor, eps: Tensor) -> Tensor | float:
        """The ratio (|z| / |eps|)^2 of each sample (B, 1, ...), or 1, which it is on average."""
        if self.corrector == "annealed":
            return 1.0
        axes = tuple(range(1, z.ndim))
        return z.square().sum(axes, keepdim=True) / eps.square().sum(axes, keepdim=True)
