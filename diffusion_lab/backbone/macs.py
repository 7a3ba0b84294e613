"""Multiply-accumulates (MACs) of a network, module by module, from the shapes of a forward pass.

A linear layer has D_in MACs for each number in its output, a convolution C_in k^2 / groups. A
module that multiplies outside of such layers, as attention does between tokens, counts this in a
method `mixing_macs(*forward_inputs) -> int`. Norms, activations and sums are not counted.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# modules with one row of weights per output channel, and per input channel
PER_OUTPUT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PER_INPUT = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRAINING_PASSES = 3  # a step costs 3 forward passes, as the backward pass costs about 2


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a module, or of all modules whose names begin with `name`."""

    name: str
    params: int
    macs: int


def count(network: nn.Module, forward: Callable[[], object]) -> list[Cost]:
    """Counts the parameters and MACs of each module without its children, in one call of `forward`.

    A shared module is listed once, with the MACs of all its calls.
    """
    names = {module: name for name, module in network.named_modules()}
    params, macs = dict.fromkeys(names.values(), 0), dict.fromkeys(names.values(), 0)
    for name, parameter in network.named_parameters():
        params[name.rpartition(".")[0]] += parameter.numel()

    def add(module: nn.Module, inputs: tuple, keywords: dict, output: Tensor) -> None:
        own = 0
        if isinstance(module, PER_OUTPUT):
            own = output.numel() * module.weight[0].numel()
        elif isinstance(module, PER_INPUT):
            own = inputs[0].numel() * module.weight[0].numel()
        if mixing_macs := getattr(module, "mixing_macs", None):
            own += mixing_macs(*inputs, **keywords)
        macs[names[module]] += own

    hooks = [module.register_forward_hook(add, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [Cost(name, params[name], macs[name]) for name in names.values()]


class Untracked(nullcontext):
    """No tracking of modules: PyTorch's fails where a network takes a gradient itself."""

    parents = frozenset({"Global"})


def seen_flops(forward: Callable[[], object]) -> int:
    """FLOPs of the convolutions and matrix products that PyTorch sees in a call of `forward`."""
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with torch.no_grad(), counter:
        forward()
    return counter.get_total_flops()


def total(costs: Iterable[Cost], name: str = "") -> Cost:
    """The sum of costs."""
    costs = list(costs)
    return Cost(name, sum(cost.params for cost in costs), sum(cost.macs for cost in costs))


def by_level(costs: list[Cost], depth: int) -> list[Cost]:
    """Sums over the modules whose names share their first `depth` parts.

    A module above that depth is counted without its children; sums that are 0 are left out.
    """
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(".".join(cost.name.split(".")[:depth]), []).append(cost)
    sums = [total(group, name) for name, group in groups.items()]
    return [cost for cost in sums if cost.params or cost.macs]
