"""Muon; its own file, since importing timm takes seconds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import timm.optim
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
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


class Muon(timm.optim.Muon):
    """Muon for hidden matrices, AdamW for all other parameters (arXiv:2502.16982).

    Muon's update is about the momentum's nearest semi-orthogonal matrix, found by `ns_steps`
    Newton-Schulz iterations in bf16; a kernel (out, in, h, w) counts as a matrix (out, in h w). An
    update of out x in numbers is multiplied by `lr`, and with `match_rms_adamw` by
    0.2 sqrt(max(out, in)), after which its numbers are as large as AdamW's; with `original` by
    sqrt(max(1, out / in)).

    Matrices of one size are moved together, as many small products are one that takes a fifth of
    their time. Of a sharded matrix a rank keeps its rows of the momentum; the update is gathered,
    and each rank computes all of it.
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
        # of muP: an update has the right size for any width, or grows with the root of the width
        self.width_power = 0.0 if adjust_lr_fn == "original" else 0.5
        # else timm's AdamW would use Nesterov's momentum, and Muon's eps
        self.not_hidden = {"use_muon": False, "lr": vector_lr, "nesterov": False, "eps": eps}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step after `closure`, whose result it returns; it uses up sharded gradients."""
        with torch.enable_grad():
            loss = closure() if closure else None
        every = self.param_groups
        for group in every:
            alike: dict[tuple, list[nn.Parameter]] = {}
            for each in group["params"] if group["use_muon"] else ():
                if each.grad is not None:
                    key = len(each), each.numel(), each.device, each.dtype
                    alike.setdefault(key, []).append(each)
            for matrices in alike.values():
                together = max(1, STACKED // matrices[0].numel())
                for start in range(0, len(matrices), together):
                    self._move(matrices[start : start + together], group)
        self.param_groups = [group for group in every if not group["use_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Moves matrices of one size as timm's step moves each, with the same numbers."""
        updates = []
        for each in matrices:
            state, grad = self.state[each], cast(Tensor, each.grad)
            if not state:  # as timm's step begins
                state |= {"use_muon": True, "momentum_buffer": torch.zeros_like(each)}
            momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            if isinstance(update, DTensor):
                update, each.grad = update.full_tensor(), None
            updates.append(update.flatten(1))
        settings = {key: group[key] for key in ("eps", "safety_factor", "scale_eps")}
        polar = zeropower_via_newtonschulz(
            torch.stack(updates), group["ns_steps"], COEFFICIENTS, **settings
        )
        factor = group["lr"] * get_lr_scale(polar.shape, group["adjust_lr_fn"])
        for each, moved in zip(matrices, polar, strict=True):
            each.mul_(1 - group["lr"] * group["weight_decay"])
            each.add_(shared_as(moved.view(each.shape), each), alpha=-factor)
