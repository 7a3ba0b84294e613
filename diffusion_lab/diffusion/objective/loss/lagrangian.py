"""Lagrangian self-distillation: the end of a jump moves with the velocity trained beside it."""

from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import Fraction, settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump
from diffusion_lab.diffusion.objective.loss.base import Losses, Parts, mean_square, same_dropout
from diffusion_lab.diffusion.objective.loss.mean_flow import Jumps, between, rates
from diffusion_lab.diffusion.objective.prediction import X0


@settings
class Lagrangian(Jumps):
    """|output of df/ds - F(f, s)|^2, without gradient through F(f, s) (arXiv:2505.18825).

    The Lagrangian condition is df/ds = v(f, s) for the end f(x, t, s) of a jump. A point and a
    velocity there determine x0 and eps, and with them an output of the network, of any prediction.
    By the condition, the output that belongs to df/ds is the network's own at (f, s).
    The samples that do not jump train F by the denoising loss. They are three quarters of a batch,
    as the velocity must be learned first, and take no derivative; the share is exact over training,
    however a batch is divided. The paper's learned weight of each pair of levels is left out.
    """

    instant: Fraction = 0.75

    forward_mode = True

    rules: ClassVar[Rules] = {
        "learns nothing from jumps to an image if the network predicts it; write "
        "objective/prediction=flow, v, eps or edm": (
            lambda loss, prediction: isinstance(prediction, X0)
        ),
    }

    @property
    def extra_passes(self) -> float:
        """For a jump the derivative and its gradient, which cost 1 and 2, and F at the end."""
        return 4.0 * (1 - self.instant)

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        count = parts.count(1 - self.instant, len(x0))
        # sharded weights need as many calls of each rank, so one sample of each kind is tried
        tried, still = max(count, 1), min(count, len(x0) - 1)
        other = parts.time_sampler(tried, parts.schedule, generator)[0].to(x0.device)
        here, there = between(parts.schedule, level.t[:tried], other.t)
        x, told = add_noise(x0[:tried], eps[:tried], here), given[:tried]

        def jumped(t: Tensor) -> Tensor:
            to = parts.schedule(t)
            return jump(x, denoiser(x, here.towards(to), told).x0, here, to)

        with same_dropout(x):
            end, drift = derivative(jumped, (there.t,), (torch.ones_like(there.t),))
        with torch.no_grad():
            own = denoiser(end, there, told).output
        jumps = mean_square(output_of(parts, end, drift, there) - own)
        x0, eps, stays = x0[still:], eps[still:], level[still:]
        output = denoiser(add_noise(x0, eps, stays), stays.towards(stays), given[still:]).output
        denoised = mean_square(output - parts.prediction.target(x0, eps, stays))
        losses = torch.cat([jumps[:count], denoised[count - still :]])
        return Losses(losses, parts.schedule(torch.cat([here.t[:count], level.t[count:]])))


def output_of(parts: Parts, x: Tensor, velocity: Tensor, level: NoiseLevel) -> Tensor:
    """The output (B, C, H, W) of a network whose path at x has this velocity."""
    d_alpha, d_sigma = rates(parts.schedule, level)
    scale = level.alpha * d_sigma - level.sigma * d_alpha

    def mixed(of_x: Tensor, of_velocity: Tensor) -> Tensor:
        return broadcast(of_x / scale, x) * x + broadcast(of_velocity / scale, x) * velocity

    x0, eps = mixed(d_sigma, -level.sigma), mixed(-d_alpha, level.alpha)
    return parts.prediction.target(x0, eps, level)
