"""Muon; its own file, since importing timm takes seconds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import timm.optim
import torch
from timm.optim.muon import (
    get_lr_scale,
    muon,
    zeropower_via_newtonschulz,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion_lab.common.ranges import at_least, flag, inside, numbers, one_of, ranges, whole
from diffusion_lab.compute.sharding import shared_as

BETAS = numbers(
    "a list of two numbers from 0 to below 1",
    lambda value: len(value) == 2 and all(0 <= each < 1 for each in value),
).as_in([0.9, 0.999])

STACKED = 2**22  # numbers of the matrices that are moved at once, as their copies take memory
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]  # of the iteration; timm calls them original
NEWTON_SCHULZ = ["ns_steps", "ns_coefficients", "eps", "safety_factor", "adjust_lr_fn"]
NEWTON_SCHULZ += ["conv_mode", "normalize_spatial", "scale_eps"]


class Muon(timm.optim.Muon):
    """Muon for hidden matrices, AdamW for all other parameters (arXiv:2502.16982).

    Muon's update is about the momentum's nearest semi-orthogonal matrix, found by `ns_steps`
    Newton-Schulz iterations in bf16; a kernel (out, in, h, w) counts as a matrix (out, in h w). An
    update of out x in numbers is multiplied by `lr`, and with `match_rms_adamw` by
    0.2 sqrt(max(out, in)), after which its numbers are as large as AdamW's; with `original` by
    sqrt(max(1, out / in)).

    Of a sharded matrix a rank keeps its rows of the momentum; the update is gathered, one matrix
    at a time, and each rank computes all of it.
    """

    @ranges(
        lr=at_least(0),
        vector_lr=at_least(0),
        weight_decay=at_least(0),
        momentum=inside(0, 1),
        nesterov=flag(),
        ns_steps=whole(1, 10),
        adjust_lr_fn=one_of("match_rms_adamw", "original"),
        betas=BETAS,
        eps=at_least(0),
    )
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        vector_lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str,
        betas: Sequence[float],
        eps: float,
    ):
        super().__init__(
            [{"params": list(parameters), "use_muon": True}],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients="original",
            adjust_lr_fn=adjust_lr_fn,
            betas=(betas[0], betas[1]),
        )
        # else timm's AdamW would use Nesterov's momentum, and Muon's eps
        self.not_hidden = {"use_muon": False, "lr": vector_lr, "nesterov": False, "eps": eps}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step after `closure`, whose result it returns; it uses up sharded gradients."""
        with torch.enable_grad():
            loss = closure() if closure else None
        whole: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            alike: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"] if group["use_muon"] else ():
                if isinstance(parameter.grad, DTensor):
                    self._move_sharded(parameter, parameter.grad, group)
                    parameter.grad = None  # timm's step leaves it out
                elif parameter.grad is not None:
                    key = len(parameter), parameter.numel(), parameter.device, parameter.dtype
                    alike.setdefault(key, []).append(parameter)
            for parameters in alike.values():
                self._move_alike(parameters, group)
                whole |= {each: cast(Tensor, each.grad) for each in parameters}
        for parameter in whole:
            parameter.grad = None
        super().step()
        for parameter, grad in whole.items():
            parameter.grad = grad
        return loss

    def _move_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Moves matrices of one size as timm's step moves each, with the same numbers.

        Many small products are one, which takes a fifth of the time of a launch each.
        """
        for each in parameters:
            if not self.state[each]:  # as timm's step begins
                self.state[each] |= {"use_muon": True, "momentum_buffer": torch.zeros_like(each)}
        momenta = [self.state[each]["momentum_buffer"] for each in parameters]
        grads = [cast(Tensor, each.grad) for each in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = group["nesterov"]
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if nesterov else momenta
        settings = {key: group[key] for key in ("eps", "safety_factor", "scale_eps")}
        together = max(1, STACKED // parameters[0].numel())
        torch._foreach_mul_(cast(list[Tensor], parameters), 1 - group["lr"] * group["weight_decay"])
        for start in range(0, len(parameters), together):
            chosen = slice(start, start + together)
            stack = torch.stack([each.flatten(1) for each in updates[chosen]])
            polar = zeropower_via_newtonschulz(stack, group["ns_steps"], COEFFICIENTS, **settings)
            factor = group["lr"] * get_lr_scale(polar.shape, group["adjust_lr_fn"])
            for each, moved in zip(parameters[chosen], polar, strict=True):
                each.add_(moved.view_as(each), alpha=-factor)

    def _move_sharded(self, parameter: nn.Parameter, grad: DTensor, group: dict[str, Any]) -> None:
        """Moves a sharded matrix as timm's step moves a whole one."""
        state = self.state[parameter]
        if not state:  # as timm's step begins
            state |= {"use_muon": True, "momentum_buffer": torch.zeros_like(parameter)}
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        gathered = cast(DTensor, update).full_tensor()
        moved, before = torch.zeros_like(gathered), torch.zeros_like(gathered)
        plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        settings = plain | {key: group[key] for key in ("lr", *NEWTON_SCHULZ)}
        muon([moved], [gathered], [before], **settings)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(shared_as(moved, parameter))
