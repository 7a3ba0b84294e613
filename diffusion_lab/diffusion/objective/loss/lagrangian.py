"""Lagrangian self-distillation: the end of a jump moves with the velocity that is trained, too.

The Lagrangian condition is df/ds = v(f, s) for the end f(x, t, s) of a jump. A point and a velocity
there determine x0 and eps, and with them an output of the network, of any prediction. By the
condition, the output that belongs to df/ds is the network's own at (f, s).
"""

from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.ranges import settings
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast, jump
from diffusion_lab.diffusion.objective.loss.base import Losses, Parts, mean_square, same_dropout
from diffusion_lab.diffusion.objective.loss.mean_flow import Jumps, rates
from diffusion_lab.diffusion.objective.prediction import X0


@settings
class Lagrangian(Jumps):
    """|output of df/ds - F(f, s)|^2, without gradient through F(f, s) (arXiv:2505.18825).

    The samples that do not jump train F by the denoising loss. The paper's learned weight of each
    pair of levels is left out.
    """

    forward_mode = True
    extra_passes = 4.0  # the derivative and its gradient, which cost 1 and 2, and F at the end

    rules: ClassVar[Rules] = {
        "learns nothing from jumps to an image if the network predicts it; write "
        "objective/prediction=flow, v, eps or edm": (
            lambda loss, prediction: isinstance(prediction, X0)
        ),
    }

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        here, there = self.ends(parts, level, generator)
        x = add_noise(x0, eps, here)

        def jumped(t: Tensor) -> tuple[Tensor, Tensor]:
            to = parts.schedule(t)
            estimate = denoiser(x, here.towards(to), given)
            assert estimate.output is not None, "a denoiser answers with its output"
            return jump(x, estimate.x0, here, to), estimate.output

        with same_dropout(x):
            (end, output), (drift, _) = derivative(jumped, (there.t,), (torch.ones_like(there.t),))
        with torch.no_grad():
            own = denoiser(end, there, given).output
        jumps = output_of(parts, end, drift, there) - own
        stays = output - parts.prediction.target(x0, eps, here)
        error = torch.where(broadcast(here.t == there.t, x).bool(), stays, jumps)
        return Losses(mean_square(error), here)


def output_of(parts: Parts, x: Tensor, velocity: Tensor, level: NoiseLevel) -> Tensor:
    """The output (B, C, H, W) of a network whose path at x has this velocity."""
    d_alpha, d_sigma = rates(parts.schedule, level)
    scale = level.alpha * d_sigma - level.sigma * d_alpha

    def mixed(of_x: Tensor, of_velocity: Tensor) -> Tensor:
        return broadcast(of_x / scale, x) * x + broadcast(of_velocity / scale, x) * velocity

    x0, eps = mixed(d_sigma, -level.sigma), mixed(-d_alpha, level.alpha)
    return parts.prediction.target(x0, eps, level)
