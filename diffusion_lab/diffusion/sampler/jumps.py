"""Samplers for models that draw a sample in one to four network calls."""

from itertools import pairwise

from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.diffusion.noise import add_noise, jump
from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.time_grid import EVEN_T, TimeGrid


@settings
class FlowMap(Sampler):
    """Jumps along the exact path from each level of the grid to the next, one call a jump.

    For models that are told where a jump goes (arXiv:2410.12557, 2505.13447).
    """

    steps: Count = 2
    time_grid: TimeGrid = EVEN_T

    jumps = True

    def walk(self, denoise, x, levels, schedule, randn_like):
        for here, there in pairwise(levels):
            x = jump(x, denoise(x, here.towards(there)).x0, here, there)
            yield x


@settings
class FewStep(Sampler):
    """Jumps to clean data from each level of the grid, and back to the next with fresh noise.

    Multistep consistency sampling (arXiv:2303.01469, algorithm 1).
    """

    steps: Count = 2
    time_grid: TimeGrid = EVEN_T

    needs_consistency = True

    def walk(self, denoise, x, levels, schedule, randn_like):
        clean = levels[-1]
        for here, there in pairwise(levels):
            x0 = denoise(x, here.towards(clean)).x0
            x = add_noise(x0, randn_like(x0), there) if there.sigma > 0 else there.alpha * x0
            yield x
