"""What happens to a bad step, one whose loss or gradient is not finite: it is skipped.

| when | what | where |
|---|---|---|
| a micro-batch's loss is not finite | its gradient becomes NaN, so all ranks see it | `poisoned` |
| the step's gradient has no finite norm | gradients are dropped, buffers put back | `settle` |
| the step ends | weights and optimiser are as before; the step counts, as does its batch | |
| | the average of the weights leaves it out | callbacks/weight_averaging.py |
| | the mean of the losses leaves it out | callbacks/throughput.py |
| | no checkpoint is written | callbacks/checkpoint.py |
| | it is counted; `patience` of them in a row are looked into, and end the run or take it back \
| callbacks/non_finite.py |

Callbacks ask `trainer.lightning_module.bad_steps.skipped` whether the last step was bad.
"""

import torch
from torch import Tensor, nn


class BadSteps:
    """Finds and undoes the bad steps of a module; the ranks agree, as they have one gradient."""

    def __init__(self) -> None:
        self.skipped = False  # whether the last step was bad
        self._buffers: list[Tensor] = []

    def begin(self, module: nn.Module) -> None:
        """Remembers what a step that is skipped must not have changed."""
        self._buffers = [buffer.detach().clone() for buffer in module.buffers()]

    @staticmethod
    def poisoned(loss: Tensor) -> Tensor:
        """The loss (), with a gradient that is not finite where it is not finite itself."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def settle(self, module: nn.Module, norm: Tensor, has_scaler: bool) -> None:
        """Judges a step of a module by its gradient's norm (), and undoes one that is bad."""
        self.skipped = not norm.isfinite()  # where a GPU is waited for, once a step
        if not self.skipped:
            return
        if not has_scaler:  # which has seen it too, and skips the step itself
            for parameter in module.parameters():
                parameter.grad = None  # optimisers pass over these
        for buffer, before in zip(module.buffers(), self._buffers, strict=True):
            buffer.data.copy_(before)  # some that others made ask for gradients
