"""Attention over tokens, softmax(q k^T / sqrt(d)) v (arXiv:1706.03762).

B batch, N tokens, L tokens of the context, D width, h heads, d = D / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.common import forward_mode


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of q (B, h, N, d) over k and v (B, h, L, d) -> (B, h, N, d).

    mask (N, L) is True where a query may look; `scale` is that of products, 1 / sqrt(d) if None.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if slow or forward_mode.is_taken():
        # the fused kernel's backward runs at float32 speed on CPUs, half the speed of matmuls, and
        # it has no forward-mode derivative
        batch = q.shape[:2]
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        bias, beta = q.new_zeros(()), 0
        if mask is not None:
            bias, beta = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf")), 1
        scores = torch.baddbmm(bias, q, k.mT, beta=beta, alpha=scale or q.shape[-1] ** -0.5)
        return (scores.softmax(-1) @ v).unflatten(0, batch)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs (x_i, x_{i + d/2}) of x (B, h, N, d) by angles (..., M, d / 2): rotary positions.

    arXiv:2104.09864. Where N > M, the first N - M tokens have no position and stay as they are.
    """
    tokens = angles.shape[-2]
    free, placed = x.split([x.shape[2] - tokens, tokens], dim=2)
    first, second = placed.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    placed = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([free, placed], dim=2)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Splits a projection (B, N, parts D) into `parts` tensors (B, h, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def heads_of(channels: int, head_channels: int) -> int:
    """The number of heads of `head_channels`; raises ValueError if they do not divide channels."""
    if channels % head_channels:
        raise ValueError(
            f"head_channels={head_channels} must divide the {channels} channels of a level, or "
            "be null for a single head"
        )
    return channels // head_channels


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError where heads do not divide the width."""
    if width % heads:
        best = next(fewer for fewer in range(min(heads, width), 0, -1) if width % fewer == 0)
        raise ValueError(f"heads={heads} must divide width={width}, as {best} does")


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D).

    `scale` is explained at `attend`. `qk_norm` normalises queries and keys (arXiv:2302.05442).
    `angles` (M, d / 2) of rotary positions and a `mask` (M, M), which patch may look at which, are
    for the last M tokens: those before have no position, attend to all and are attended to by all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool = False,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.scale = scale
        self.angles: Tensor | None
        self.mask: Tensor | None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_q = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, N, D), (B, h, N, d) each."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype), v

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `kept` (B, K) are its last tokens' places, if not all M."""
        q, k, v = self.projected(x)
        if (angles := self.angles) is not None:
            angles = angles if kept is None else angles[kept][:, None]  # (B, 1, K, d / 2)
            q, k = rotate(q, angles), rotate(k, angles)
        mask = self.mask
        if mask is not None:
            free = x.shape[1] - len(mask)
            mask = F.pad(mask, (free, 0, free, 0), value=True)
        return self.out(attend(q, k, v, mask, self.scale).transpose(1, 2).flatten(2))

    def mixing_macs(self, x: Tensor, kept: Tensor | None = None) -> int:
        return 2 * x.numel() * x.shape[1]


class CausalAttention(SelfAttention):
    """Self-attention of at most `tokens` tokens to themselves and those before them.

    While `remembers` is set, each input continues the inputs before it, whose keys and values are
    kept in `past`; so tokens that come one by one cost one each.
    """

    def __init__(self, width: int, heads: int, tokens: int, qk_norm: bool = False):
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        super().__init__(width, heads, qk_norm, mask=seen)
        self.remembers = False
        self.past: tuple[Tensor, Tensor] | None = None

    def remember(self, remembers: bool) -> None:
        """Begins to remember inputs, or ends it; forgets what is kept."""
        self.remembers, self.past = remembers, None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        assert self.mask is not None
        q, k, v = self.projected(x)
        if self.past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past, (k, v), strict=True))
        if self.remembers:
            self.past = k, v
        known = k.shape[2]
        mask = self.mask[known - x.shape[1] : known, :known]
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, N, D) over a context (B, L, E) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, D), context (B, L, E) -> (B, N, D)."""
        (q,) = split_heads(self.q(x), 1, self.heads)
        k, v = split_heads(self.kv(context), 2, self.heads)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

    def mixing_macs(self, x: Tensor, context: Tensor) -> int:
        return 2 * x.numel() * context.shape[1]
