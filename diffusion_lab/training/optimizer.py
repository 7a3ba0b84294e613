"""Muon; its own file, since importing timm takes seconds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import timm.optim
import torch
from timm.optim.muon import muon
from torch import nn
from torch.distributed.tensor import DTensor

from diffusion_lab.common.ranges import at_least, flag, inside, numbers, one_of, ranges, whole
from diffusion_lab.compute.sharding import shared_as

BETAS = numbers(
    "a list of two numbers from 0 to below 1",
    lambda value: len(value) == 2 and all(0 <= each < 1 for each in value),
).as_in([0.9, 0.999])

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
        for group in self.param_groups:
            for parameter in group["params"] if group["use_muon"] else ():
                if isinstance(parameter.grad, DTensor):
                    self._move_sharded(parameter, parameter.grad, group)
                    parameter.grad = None  # timm's step leaves it out
        super().step()
        return loss

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
