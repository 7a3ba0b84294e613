"""Schedules given as a table of N levels; index i sits at t = (i + 1) / N, clean data at t = 0."""

import torch
from torch import Tensor

from .base import NoiseSchedule


class DDPMLinear(NoiseSchedule):
    """N steps whose betas grow linearly (arXiv:2006.11239).

    Between its points log(alpha^2) is linear in t, so alpha and sigma are defined on all of [0, 1]
    and any time grid may be used; beta_start and beta_end are a step's, so they fit N = 1000.
    """

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        if steps < 1:
            raise ValueError(f"schedule.steps={steps} must be 1 or more")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"schedule.beta_start={beta_start} and schedule.beta_end={beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1"
            )
        self.discrete_steps = steps
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        # log(alpha^2) at t = 0, 1/N, ..., 1                       (N + 1,)
        self.log_alpha2 = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.log_alpha2.to(t.device)
        position = t * self.discrete_steps
        index = position.long().clamp(0, self.discrete_steps - 1)
        log_alpha2 = torch.lerp(table[index], table[index + 1], position - index)
        # 1 - alpha^2 cancels near t = 0
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()
