"""Loss weights: functions of logSNR that multiply the squared error of x0.

Without one the loss is the plain squared error of the network's output, the "simple" loss of every
paper: DDPM's, flow matching's, and EDM's, whose weight times c_out^2 is 1.
"""

from collections.abc import Callable

from torch import Tensor

Weighting = Callable[[Tensor], Tensor]  # logSNR (B,) -> weight of the x0 error (B,), both float64


class MinSNR:
    """min(snr, gamma): caps the weight of almost clean samples (arXiv:2303.09556)."""

    def __init__(self, gamma: float = 5.0):
        if gamma <= 0:
            raise ValueError(f"objective.weighting.gamma={gamma} must be above 0")
        self.gamma = gamma

    def __call__(self, logsnr: Tensor) -> Tensor:
        return logsnr.exp().clamp(max=self.gamma)
