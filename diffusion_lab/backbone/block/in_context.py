"""In-context conditioning: the condition is tokens among tokens (arXiv:2212.09748)."""

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_lab.backbone.block.base import Block
from diffusion_lab.backbone.conditioning import Condition


class InContext(Block):
    """x + branch(LayerNorm(x)), where x begins with the condition's tokens."""

    prepends = True

    def __init__(self, width: int, mixer: Callable[[], nn.Module], mlp_ratio: float):
        super().__init__(width, mixer, mlp_ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in self.branches)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x))
        return x
