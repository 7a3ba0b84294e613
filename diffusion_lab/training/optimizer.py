"""Muon; its own file, since importing timm takes seconds."""

from collections.abc import Iterable, Sequence

import timm.optim
from torch import nn

from diffusion_lab.common.ranges import at_least, flag, inside, numbers, one_of, ranges, whole

BETAS = numbers(
    "a list of two numbers from 0 to below 1",
    lambda value: len(value) == 2 and all(0 <= each < 1 for each in value),
).as_in([0.9, 0.999])


class Muon(timm.optim.Muon):
    """Muon for hidden matrices, AdamW for all other parameters (arXiv:2502.16982).

    Muon's update is about the momentum's nearest semi-orthogonal matrix, found by `ns_steps`
    Newton-Schulz iterations in bf16; a kernel (out, in, h, w) counts as a matrix (out, in h w). An
    update of out x in numbers is multiplied by `lr`, and with `match_rms_adamw` by
    0.2 sqrt(max(out, in)), after which its numbers are as large as AdamW's; with `original` by
    sqrt(max(1, out / in)).
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
