"""The left-point rule: x_there = alpha x0 + sigma eps, both as estimated at `here`."""

from itertools import pairwise

from diffusion_lab.diffusion.noise import jump
from diffusion_lab.diffusion.sampler.base import Sampler


class Euler(Sampler):
    """First order; the same as DDIM at eta = 0 under every schedule (arXiv:2010.02502).

    With alpha = 1 - t it is Euler's method for rectified flow, with alpha = 1 that of EDM.
    """

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x = jump(x, denoise(x, here).x0, here, there)
            yield x
