"""The trapezoid rule for dx = x0 d(alpha) + eps d(sigma)."""

from itertools import pairwise

from diffusion_lab.noise import jump

from .base import Sampler


class Heun(Sampler):
    """Second order, 2 steps - 1 network calls; EDM's deterministic sampler where alpha = 1.

    arXiv:2206.00364, algorithm 2 with no churn; with alpha = 1 - t it is Heun's method for
    rectified flow.
    """

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x0 = denoise(x, here).x0
            if there.sigma > 0:  # eps is 0/0 on clean data: there the last step stays an Euler step
                end = denoise(jump(x, x0, here, there), there).x0
                # Averaging x0 and eps over both ends, with eps = (x - alpha x0) / sigma, leaves x
                # with the coefficient that it has in jump, and the two x0 with these shares of it.
                x0 = x0 + here.sigma / (2 * there.sigma) * (end - x0)
            x = jump(x, x0, here, there)
            yield x
