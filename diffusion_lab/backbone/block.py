"""Blocks: tokens and a condition -> tokens, for any mixer and each way to condition.

Four ways to condition are from arXiv:2212.09748, adaLN-single is from arXiv:2310.00426. B batch, N
tokens, L condition tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import CrossAttention
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.common.ranges import between, one_of, ranges

HEAD_WIDTH = 64  # least width of a head; the heads must divide the width
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales x (B, N, D) by 1 + scale and shifts it, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SwiGLU(nn.Module):
    """W2 (silu(a) b), where (a, b) = W1 x (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner = nn.Linear(width, 2 * hidden)
        self.outer = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.outer(F.silu(gate) * value)


def mlp(width: int, hidden: int, activation: str) -> nn.Module:
    """The MLP of a block; SwiGLU, with three matrices, has two thirds of the hidden width."""
    if activation == "swiglu":
        return SwiGLU(width, max(1, 2 * hidden // 3))
    bend = ACTIVATIONS[activation]()
    return nn.Sequential(nn.Linear(width, hidden), bend, nn.Linear(hidden, width))


class Block(nn.Module, ABC):  # bases in this order, as FSDP2 makes a subclass
    """One layer of a token network: a mixer of tokens, then an MLP if `mlp_ratio` is not 0.

    A block is configured as a factory: the network calls it with the facts `width` and `mixer`, a
    constructor of the module that mixes tokens, (B, N, D) -> (B, N, D). With `backbone.routed` the
    mixer also takes `kept` (B, K), the patches that its last tokens are. A method `initialise` of a
    block or of its modules makes exceptions to the network's initialisation, after it.
    `activation` is the MLP's: gelu, gelu_tanh or swiglu, which is a gate with as many parameters.
    `norm` is layer, or rms for root mean squares (arXiv:1910.07467), also before the network's
    last layer.
    """

    shared = 0  # numbers of a modulation that the network computes once for all blocks
    prepends = False  # whether the condition's tokens go through the blocks, before the patches'

    @ranges(mlp_ratio=between(0, 100))
    def __init__(
        self,
        width: int,
        mixer: Callable[[], nn.Module],
        mlp_ratio: float = 4.0,
        # the exact GELU: the tanh form of the paper, 5e-4 away, takes 3 times as long on a CPU
        activation: Annotated[str, one_of(*ACTIVATIONS, "swiglu")] = "gelu",
        norm: Annotated[str, one_of(*NORMS)] = "layer",
    ):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.mixer = mixer()
        self.mlp = mlp(width, hidden, activation) if hidden else None
        self.make_norm = partial(NORMS[norm], width, eps=1e-6)
        self.add_parts(width)

    def add_parts(self, width: int) -> None:
        """Adds the modules that a kind of block has beside its mixer and MLP; none by default."""

    @property
    def branches(self) -> list[nn.Module]:
        """The modules whose outputs are added to the tokens, in turn."""
        return [self.mixer] if self.mlp is None else [self.mixer, self.mlp]

    def calls(self, condition: Condition) -> list[Callable[[Tensor], Tensor]]:
        """The branches, the mixer told which patches it sees if these are not all."""
        kept = condition.kept
        mixer = self.mixer if kept is None else partial(self.mixer, kept=kept)
        return [mixer, *self.branches[1:]]

    def shared_modulation(self, width: int) -> nn.Sequential | None:
        """Makes the modulation that the network computes once for all blocks, if they share one."""
        return nn.Sequential(nn.SiLU(), nn.Linear(width, self.shared)) if self.shared else None

    @abstractmethod
    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D).

        The network has added its noise embedding to condition.vector (B, D), and set it before
        condition.tokens (B, L, D).
        """


class AdaLN(Block):
    """Adaptive layer norm, x + branch(modulate(LayerNorm(x), c)), with no modulation at first."""

    coefficients = 2  # per branch: shift, scale

    def add_parts(self, width: int) -> None:
        self.norm = self.make_norm(elementwise_affine=False)
        outputs = len(self.branches) * self.coefficients * width
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))

    def initialise(self) -> None:
        """Starts without modulation, and with closed gates."""
        nn.init.zeros_(self.modulation[1].get_parameter("weight"))

    def add(self, x: Tensor, branch: Callable, *coefficients: Tensor) -> Tensor:
        """Adds one branch to x (B, N, D), modulated by its coefficients (B, D)."""
        shift, scale = coefficients
        return x + branch(modulate(self.norm(x), shift, scale))

    def modulated_by(self, condition: Condition) -> Tensor:
        """The coefficients of all branches, (B, K D)."""
        return self.modulation(condition.vector)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        coefficients = self.modulated_by(condition).chunk(len(self.branches), dim=1)
        for branch, own in zip(self.calls(condition), coefficients, strict=True):
            x = self.add(x, branch, *own.chunk(self.coefficients, dim=1))
        return x


class AdaLNZero(AdaLN):
    """x + gate(c) * branch(modulate(LayerNorm(x), c)), at first the identity: gates are 0."""

    coefficients = 3  # shift, scale, gate

    def add(self, x: Tensor, branch: Callable, *coefficients: Tensor) -> Tensor:
        shift, scale, gate = coefficients
        return x + gate[:, None] * branch(modulate(self.norm(x), shift, scale))


class AdaLNSingle(AdaLNZero):
    """adaLN-Zero with coefficients that one layer computes for all blocks, plus a table of its own.

    That layer and the tables start at zero (arXiv:2310.00426 starts tables at random).
    """

    def add_parts(self, width: int) -> None:
        self.norm = self.make_norm(elementwise_affine=False)
        self.shared = len(self.branches) * self.coefficients * width
        self.table = nn.Parameter(torch.zeros(self.shared))

    def initialise(self) -> None:
        nn.init.zeros_(self.table)

    def modulated_by(self, condition: Condition) -> Tensor:
        assert condition.modulation is not None, "the network has set it"
        return condition.modulation + self.table.to(condition.modulation.dtype)


class CrossAttentionBlock(Block):
    """x + mixer(LayerNorm(x)), then the same with attention over the condition, then the MLP."""

    def add_parts(self, width: int) -> None:
        most = max(width // HEAD_WIDTH, 1)
        heads = next(heads for heads in range(most, 0, -1) if width % heads == 0)
        self.cross = CrossAttention(width, heads, context_width=width)
        self.norms = nn.ModuleList(self.make_norm() for _ in range(len(self.branches) + 1))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        x = x + self.calls(condition)[0](self.norms[0](x))
        x = x + self.cross(self.norms[1](x), condition.tokens)
        return x if self.mlp is None else x + self.mlp(self.norms[2](x))


class InContext(Block):
    """x + branch(LayerNorm(x)), where x begins with the condition's tokens."""

    prepends = True

    def add_parts(self, width: int) -> None:
        self.norms = nn.ModuleList(self.make_norm() for _ in self.branches)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        for norm, branch in zip(self.norms, self.calls(condition), strict=True):
            x = x + branch(norm(x))
        return x
