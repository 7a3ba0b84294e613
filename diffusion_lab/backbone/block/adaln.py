"""Adaptive layer norm: the condition scales and shifts each branch's input (arXiv:2212.09748)."""

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_lab.backbone.block.base import Block
from diffusion_lab.backbone.conditioning import Condition


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled by 1 + scale and shifted, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLN(Block):
    """x + branch(modulate(LayerNorm(x), c)), with no modulation at first."""

    coefficients = 2  # of a branch: shift, scale

    def __init__(self, width: int, mixer: Callable[[], nn.Module], mlp_ratio: float):
        super().__init__(width, mixer, mlp_ratio)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        outputs = len(self.branches) * self.coefficients * width
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))

    def initialise(self) -> None:
        """No modulation, and closed gates."""
        nn.init.zeros_(self.modulation[1].get_parameter("weight"))

    def add(self, x: Tensor, branch: nn.Module, *coefficients: Tensor) -> Tensor:
        """x (B, N, D) with one branch added, its coefficients (B, D)."""
        shift, scale = coefficients
        return x + branch(modulate(self.norm(x), shift, scale))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        coefficients = self.modulation(condition.vector).chunk(
            len(self.branches) * self.coefficients, dim=1
        )
        for i, branch in enumerate(self.branches):
            first = i * self.coefficients
            x = self.add(x, branch, *coefficients[first : first + self.coefficients])
        return x


class AdaLNZero(AdaLN):
    """x + gate(c) * branch(modulate(LayerNorm(x), c)).

    The gates start at zero, so that a new block is the identity.
    """

    coefficients = 3  # and a gate

    def add(self, x: Tensor, branch: nn.Module, *coefficients: Tensor) -> Tensor:
        """x (B, N, D) with one branch added, its coefficients (B, D)."""
        shift, scale, gate = coefficients
        return x + gate[:, None] * branch(modulate(self.norm(x), shift, scale))
