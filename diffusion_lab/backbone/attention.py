"""Self-attention over tokens, softmax(q k^T / sqrt(d)) v (arXiv:1706.03762).

B batch, N tokens, D width, h heads, d = D / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, h, N, d) over k and v (B, h, M, d) -> (B, h, N, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # the fused kernel's backward runs at float32 speed on CPUs, at half that of matmuls
        batch = q.shape[:2]
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ v).unflatten(0, batch)
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"{heads} heads do not divide a width of {width}; write a number of heads that does"
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, h, N, d) each
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))
