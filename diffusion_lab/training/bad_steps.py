"""Skips bad steps: those whose loss or gradient is not finite.

| when | what | where |
|---|---|---|
| a micro-batch's loss is not finite | its gradient becomes NaN, so all ranks see it | `poisoned` |
| the step's gradient has no finite norm | the optimiser skips it, buffers are put back | `settle` |
| the step ends | weights and optimiser are as before; the step counts, as does its batch | |
| | the average of the weights leaves it out | callbacks/weight_averaging.py |
| | snapshots' averages count it as one without change | callbacks/weight_averaging.py |
| | the means of losses and gradient norms leave it out | callbacks/throughput.py |
| | no checkpoint is written | callbacks/checkpoint.py |
| | some in a row are investigated, and end the run or roll it back | callbacks/non_finite.py |

A GPU knows by `bad_steps.bad` whether a step was bad, and keeps weights, averages and buffers as
they were without asking the host. Callbacks that ask `bad_steps.skipped` wait for the GPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd


class BadSteps:
    """Finds and undoes the bad steps of a module; ranks agree because they share the gradient."""

    def __init__(self) -> None:
        self.bad = torch.zeros((), dtype=torch.bool)  # whether the last step was bad
        self.found_inf: Tensor | None = None  # the same as 1.0 or 0.0, for the kernels of a GPU
        self._buffers: list[Tensor] | None = None
        self._before: list[Tensor] = []

    @property
    def skipped(self) -> bool:
        """Whether the last step was bad; waits for a GPU."""
        return bool(self.bad)

    def begin(self, module: nn.Module) -> None:
        """Saves the buffers of a module, which a skipped step must not change."""
        if self._buffers is None:  # walking over all modules takes longer than a small step
            self._buffers = list(module.buffers())
        self._before = [each.detach().clone() for each in self._buffers]

    @staticmethod
    def poisoned(loss: Tensor) -> Tensor:
        """Returns the loss (), with a gradient of NaN if the loss is not finite."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def settle(self, norm: Tensor, optimizer: Optimizer | None) -> None:
        """Tells by the gradient's norm () whether a step is bad, and lets an optimiser skip that.

        On a GPU, fused optimisers and Muon look at `found_inf` in their step; others, and a CPU,
        are not given the gradients. None skips the step itself, as a scaler of float16 does.
        """
        self.bad = ~norm.isfinite()
        self.found_inf = None if norm.is_cpu else self.bad.float()
        looks = getattr(optimizer, "_step_supports_amp_scaling", False)
        if optimizer is not None and looks and self.found_inf is not None:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        elif optimizer is not None and self.skipped:
            optimizer.zero_grad()  # optimisers skip parameters without a gradient
        if self.bad.is_cpu and not self.skipped:
            return
        for buffer, before in zip(self._buffers or (), self._before, strict=True):
            # .data: third-party buffers may require gradients
            buffer.data.copy_(torch.where(self.bad, before, buffer.data))


def fused_sgd(
    tensors: list[Tensor],
    gradients: list[Tensor],
    lr: float,
    weight_decay: float,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Moves tensors by -lr (weight_decay tensor + gradient), or + gradient to `maximize`.

    PyTorch has one kernel for all of them, which does nothing where `found_inf`, (), is 1. Tensors
    and gradients must have one layout in memory.
    """
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    settings |= {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "fused": True}
    sgd(tensors, gradients, [None] * len(tensors), found_inf=found_inf, **settings)


def move_towards(
    tensors: list[Tensor], ends: list[Tensor], weight: float, found_inf: Tensor | None
) -> None:
    """Moves tensors by `weight`, in [0, 1], of the way to their ends, unless `found_inf` is 1."""
    fused_sgd(tensors, ends, weight, 1.0, True, found_inf)
