"""Cross-attention: the tokens look at the condition's between mixer and MLP (arXiv:2212.09748)."""

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_lab.backbone.attention import CrossAttention
from diffusion_lab.backbone.block.base import Block
from diffusion_lab.backbone.conditioning import Condition

HEAD_WIDTH = 64  # at least; the heads must divide the width


class CrossAttentionBlock(Block):
    """x + mixer(LayerNorm(x)), then the same with attention over the condition, then the MLP."""

    def __init__(self, width: int, mixer: Callable[[], nn.Module], mlp_ratio: float):
        super().__init__(width, mixer, mlp_ratio)
        most = max(width // HEAD_WIDTH, 1)
        heads = next(heads for heads in range(most, 0, -1) if width % heads == 0)
        self.cross = CrossAttention(width, heads, context_width=width)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=1e-6) for _ in range(len(self.branches) + 1)
        )

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        x = x + self.mixer(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), condition.tokens)
        return x if self.mlp is None else x + self.mlp(self.norms[2](x))
