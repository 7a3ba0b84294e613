"""Loss weights: functions of logSNR that multiply the squared error of x0.

Without one the loss is the plain squared error of the network's output, the "simple" loss of every
paper: DDPM's, flow matching's, and EDM's, whose weight times c_out^2 is 1.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Positive, at_least, inside, number, settings

Weighting = Callable[[Tensor], Tensor]  # logSNR (B,) -> weight of the x0 error (B,), both float64


@settings
class MinSNR:
    """min(snr, gamma): caps the weight of almost clean samples (arXiv:2303.09556)."""

    gamma: Positive = 5.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp().clamp(max=self.gamma)


@settings
class SoftMinSNR:
    """snr gamma / (snr + gamma), min-SNR without its corner (arXiv:2401.11605).

    At alpha = 1 and gamma = 1 / sigma_d^2 that is 1 / (sigma^2 + sigma_d^2): on EDM's output
    (sigma sigma_d)^2 / (sigma^2 + sigma_d^2)^2. 4 is for a data std sigma_d of 0.5.
    """

    gamma: Positive = 4.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return self.gamma * torch.sigmoid(logsnr - math.log(self.gamma))


class SNR:
    """snr: the plain squared error of eps, and denoising score matching weighted by sigma^2."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp()


class TruncatedSNR:
    """max(snr, 1): also pure noise counts (arXiv:2202.00512)."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp().clamp(min=1)


@settings
class P2:
    """snr / (k + snr)^gamma: the loss of eps with less weight on clean samples (arXiv:2204.00227).

    gamma = 0 is SNR.
    """

    gamma: Annotated[float, at_least(0)] = 1.0
    k: Positive = 1.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        snr = logsnr.exp()
        return snr / (self.k + snr) ** self.gamma


@settings
class VelocityWeight:
    """(1 + sqrt(snr))^2, at alpha = 1 - sigma 1 / sigma^2: the error of the velocity eps - x0.

    An x0-prediction with this loss is arXiv:2511.13720's, where sigma counts as sigma_min if it is
    less.
    """

    sigma_min: Annotated[float, inside(0, 1)] = 0.05

    def __call__(self, logsnr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-logsnr / 2)  # where alpha = 1 - sigma
        return sigma.clamp(min=self.sigma_min) ** -2


@settings
class EDMWeight:
    """snr + 1 / data_std^2, at alpha = 1 EDM's (sigma^2 + s^2) / (sigma s)^2 (arXiv:2206.00364).

    data_std is the clean data's standard deviation s: 0.5 for images in [-1, 1], 1 for latents.
    """

    data_std: Positive = 0.5

    def __call__(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp() + self.data_std**-2


@settings
class SigmoidWeight:
    """sigmoid(bias - logsnr) on the error of eps (arXiv:2303.00848, 2410.19324).

    On the error of x0 it is snr sigmoid(bias - logsnr) = e^bias sigmoid(logsnr - bias): flat on
    clean samples, above the bias. The papers' bias is for a density uniform in logSNR; here the
    density is the time sampler's.
    """

    bias: Annotated[float, number()] = -1.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return math.exp(self.bias) * torch.sigmoid(logsnr - self.bias)
