"""Skips bad steps: those whose loss or gradient is not finite.

| when | what | where |
|---|---|---|
| a micro-batch's loss is not finite | its gradient becomes NaN, so all ranks see it | `poisoned` |
| the step's gradient has no finite norm | gradients are dropped, buffers put back | `settle` |
| the step ends | weights and optimiser are as before; the step counts, as does its batch | |
| | the average of the weights leaves it out | callbacks/weight_averaging.py |
| | snapshots' averages count it as one without change | callbacks/posthoc_ema.py |
| | the means of losses and gradient norms leave it out | callbacks/throughput.py, \
callbacks/level_losses.py |
| | no checkpoint is written | callbacks/checkpoint.py |
| | it is counted; `patience` in a row are investigated, and end the run or roll it back \
| callbacks/non_finite.py |

Callbacks ask `trainer.lightning_module.bad_steps.skipped` whether the last step was bad.
"""

import math

import torch
from torch import Tensor, nn


class BadSteps:
    """Finds and undoes the bad steps of a module; ranks agree because they share the gradient."""

    def __init__(self) -> None:
        self.skipped = False  # whether the last step was bad
        self._buffers: list[Tensor] = []

    def begin(self, module: nn.Module) -> None:
        """Saves the buffers of a module, which a skipped step must not change."""
        self._buffers = [buffer.detach().clone() for buffer in module.buffers()]

    @staticmethod
    def poisoned(loss: Tensor) -> Tensor:
        """Returns the loss (), with a gradient of NaN if the loss is not finite."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def settle(self, module: nn.Module, norm: float, has_scaler: bool) -> None:
        """Tells by the gradient's norm whether a step is bad, and undoes a bad step."""
        self.skipped = not math.isfinite(norm)
        if not self.skipped:
            return
        if not has_scaler:  # a scaler skips the step itself
            for parameter in module.parameters():
                parameter.grad = None  # optimisers skip parameters without a gradient
        for buffer, before in zip(module.buffers(), self._buffers, strict=True):
            buffer.data.copy_(before)  # .data: third-party buffers may require gradients
