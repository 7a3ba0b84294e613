"""The variational bound that trains a reverse variance: one term of it, at one step of a table."""

import math

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Positive, settings
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, jump, lowered
from diffusion_lab.diffusion.schedule import NoiseSchedule


@settings
class Hybrid:
    """weight x N x L_t, added to the loss of x0: L_hybrid (arXiv:2102.09672).

    L_t is the bound's term in bits per dimension, so N L_t estimates the bound. Its gradient
    reaches the variance only. Below the first level of the table L_t is the likelihood of x0 in
    steps of 2/255, and elsewhere the divergence of q(x_s | x_t, x0) from N(mean given the estimate
    of x0, learned variance), s one level below t.
    """

    weight: Positive = 0.001

    def __call__(
        self, x: Tensor, x0: Tensor, estimate: Estimate, level: NoiseLevel, schedule: NoiseSchedule
    ) -> Tensor:
        """The term added to the loss of each sample, (B,); x and x0 are (B, C, H, W)."""
        assert estimate.log_variance_weight is not None, "a variance needs a learned one"
        steps = schedule.discrete_steps
        if steps is None:
            raise ValueError("variance needs a schedule with a table, and this one has none")
        index = (level.t * steps).round().clamp(min=1)  # 1 is the cleanest level
        left, _, large = lowered(level, schedule((index - 1) / steps), 1.0)
        mean, guess = (jump(x, each, level, left) for each in (x0, estimate.x0.detach()))
        # the last step's variance is 0, so its log is replaced by the log of the step before
        clipped = index.clamp(min=2)
        _, small, _ = lowered(schedule(clipped / steps), schedule((clipped - 1) / steps), 1.0)
        low, high = broadcast(small.log(), x), broadcast(large.log(), x)
        log_variance = torch.lerp(low, high, estimate.log_variance_weight)
        divergence = (
            log_variance
            - low
            - 1
            + (low - log_variance).exp()
            + (mean - guess).square() * (-log_variance).exp()
        ) / 2
        last = broadcast(index, x) == 1
        nats = torch.where(last, negative_log_likelihood(x0, guess, log_variance), divergence)
        return self.weight * steps * (nats.flatten(1).mean(1) / math.log(2))


def negative_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass that N(mean, variance) has in x0's bin, of x0's shape, in nats.

    Bins are 2/255 wide, and those at -1 and 1 reach to infinity (arXiv:2006.11239).
    """
    scale = (-log_variance / 2).exp()
    below = torch.special.ndtr((x0 - mean - 1 / 255) * scale)
    above = torch.special.ndtr((x0 - mean + 1 / 255) * scale)
    below = torch.where(x0 < -0.999, 0, below)
    above = torch.where(x0 > 0.999, 1, above)
    return -(above - below).clamp(min=1e-12).log()
