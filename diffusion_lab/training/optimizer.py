"""Muon; its own file, since importing timm takes seconds."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, cast

import timm.optim
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from diffusion_lab.common.ranges import BETAS, Flag, at_least, inside, one_of, ranges, whole
from diffusion_lab.compute.sharding import laid_out_as, local, shared_as, unsharded
from diffusion_lab.training.bad_steps import fused_sgd, move_towards

NotNegative = Annotated[float, at_least(0)]
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

    Nothing changes in a step for which `found_inf`, (), is 1, as in PyTorch's fused optimisers.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    @ranges()
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: NotNegative,
        vector_lr: NotNegative,
        weight_decay: NotNegative,
        momentum: Annotated[float, inside(0, 1)],
        nesterov: Flag,
        ns_steps: Annotated[int, whole(1, 10)],
        adjust_lr_fn: Annotated[str, one_of("match_rms_adamw", "original")],
        betas: Annotated[Sequence[float], BETAS],
        eps: NotNegative,
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
        for group in self.param_groups:
            moved: list[Tensor] = [each for each in group["params"] if each.grad is not None]
            if not group["use_muon"]:
                self._move_by_adamw(moved, group)
                continue
            alike: dict[tuple, list[Tensor]] = {}
            for each in moved:
                key = len(each), each.numel(), each.device, each.dtype
                alike.setdefault(key, []).append(each)
            for matrices in alike.values():
                together = max(1, STACKED // matrices[0].numel())
                for start in range(0, len(matrices), together):
                    self._move(matrices[start : start + together], group)
        return loss

    def _move_by_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Moves parameters by PyTorch's fused AdamW; their state has timm's names."""
        states = [self.state[each] for each in parameters]
        for each, state in zip(parameters, states, strict=True):
            if not state:
                state |= {"use_muon": False, "step": torch.zeros(())}
                state |= {name: torch.zeros_like(each) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = state["step"].to(each.device)
        adamw(
            parameters,
            [cast(Tensor, each.grad) for each in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Moves matrices of one size as timm's step moves each, with the same numbers."""
        for each in matrices:
            if not self.state[each]:  # as timm's step begins
                self.state[each] |= {"use_muon": True, "momentum_buffer": torch.zeros_like(each)}
        momenta = [self.state[each]["momentum_buffer"] for each in matrices]
        grads: list[Tensor] = [cast(Tensor, each.grad) for each in matrices]
        aside = 1 - group["momentum"]
        move_towards([*map(local, momenta)], [*map(local, grads)], aside, self.found_inf)
        updates = momenta
        if group["nesterov"]:
            pairs = zip(grads, momenta, strict=True)
            updates = [grad.lerp(momentum, group["momentum"]) for grad, momentum in pairs]
        if isinstance(updates[0], DTensor):
            updates = [unsharded(each) for each in updates]
            for each in matrices:
                each.grad = None
        settings = {key: group[key] for key in ("eps", "safety_factor", "scale_eps")}
        stacked = torch.stack([each.flatten(1) for each in updates])
        stacked = zeropower_via_newtonschulz(stacked, group["ns_steps"], COEFFICIENTS, **settings)
        scale = get_lr_scale(stacked.shape, group["adjust_lr_fn"])
        pairs = zip(stacked.to(matrices[0].dtype), matrices, strict=True)
        moves = [local(shared_as(move.view(each.shape), each)) for move, each in pairs]
        own = [*map(local, matrices)]
        moves = [laid_out_as(*pair) for pair in zip(moves, own, strict=True)]
        decay = group["weight_decay"] / scale
        fused_sgd(own, moves, group["lr"] * scale, decay, False, self.found_inf)
