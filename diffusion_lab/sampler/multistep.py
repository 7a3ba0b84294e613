"""Multistep samplers: the left-point rule with x0 extrapolated from earlier steps."""

from itertools import pairwise

import torch

from diffusion_lab.noise import jump

from .base import Sampler


class DPMSolver(Sampler):
    """DPM-Solver++(2M): x0 extrapolated linearly to the step's middle in logSNR (arXiv:2211.01095).

    Second order with one network call a step.
    """

    def walk(self, denoise, x, levels, schedule, randn_like):
        gaps = levels.logsnr.diff().tolist()  # infinite from pure noise, and to clean data
        previous = None
        for i, (here, there) in enumerate(pairwise(levels)):
            x0 = ahead = denoise(x, here).x0
            if previous is not None and there.sigma > 0:  # the last step stays an Euler step
                # after a step from pure noise the quotient is 0: another Euler step
                ahead = torch.lerp(previous, x0, 1 + gaps[i] / (2 * gaps[i - 1]))
            x = jump(x, ahead, here, there)
            previous = x0
            yield x
