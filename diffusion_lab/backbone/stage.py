"""A stage of a U-Net: a residual block, and attention over pixels at the levels that have it.

B batch, C channels, H W height and width, E width of the noise embedding, L tokens of the context.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import CrossAttention, SelfAttention, heads_of
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.common.ranges import Count, Flag, between, optional, ranges, whole


def scaled(x: Tensor, factor: float) -> Tensor:
    """Multiplies x by the factor, without a pass over x if that is 1."""
    return x if factor == 1 else x * factor


def check_embeddings(network: nn.Module) -> None:
    """Raises ValueError if a norm takes away an added embedding, one number per channel."""
    for block in network.modules():
        if not isinstance(block, PixelResidual) or block.scale_shift:
            continue
        if block.norm2.num_groups == block.norm2.num_channels:
            raise ValueError(
                f"stage adds the embedding to {block.norm2.num_channels} channels before a norm of "
                "one channel per group, which takes it away; write scale_shift=true, or least=2 of "
                "the norm"
            )


class PixelResidual(nn.Module):
    """skip_scale (x + two convolutions of x), with the embedding between them.

    The embedding is added there; with `scale_shift` it scales and shifts what the second norm gives
    (arXiv:2105.05233). `resample`, if given, changes the resolution of both branches; x passes a
    1x1 convolution where its channels change, and always with `project`. Without an
    `embedding_width` there is no embedding.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        embedding_width: int | None,
        dropout: float,
        scale_shift: bool = False,
        skip_scale: float = 1.0,
        resample: nn.Module | None = None,
        project: bool = False,
        norm: Callable[..., GroupNorm] = GroupNorm,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        self.resample = nn.Identity() if resample is None else resample
        self.norm1 = norm(in_channels, silu=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.embedding = None
        if embedding_width is not None:
            self.embedding = nn.Linear(embedding_width, channels * (1 + scale_shift))
        self.norm2 = norm(channels, silu=not scale_shift)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        project = project or in_channels != channels
        self.skip = nn.Conv2d(in_channels, channels, 1) if project else nn.Identity()

    def initialise(self) -> None:
        """Starts with a branch that adds nothing."""
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), embedding (B, E) -> (B, C', H', W')."""
        h = self.conv1(self.resample(self.norm1(x)))
        if self.embedding is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h, shift=self.embedding(embedding))
        h = self.conv2(self.dropout(h))
        return scaled(self.skip(self.resample(x)) + h, self.skip_scale)


class PixelAttention(nn.Module):
    """Attention of all pixels, added to its input; the sum is multiplied by skip_scale.

    It is over the pixels themselves, with queries and keys normalised for `qk_norm`, or over a
    context of `context_width` (arXiv:2112.10752). None for `head_channels` is `heads` heads; raises
    ValueError if they do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int | None,
        skip_scale: float = 1.0,
        context_width: int | None = None,
        qk_norm: bool = False,
        heads: int = 1,
        norm: Callable[..., GroupNorm] = GroupNorm,
    ):
        super().__init__()
        if head_channels is not None:
            heads = heads_of(channels, head_channels)
        self.skip_scale = skip_scale
        self.norm = norm(channels)
        self.attention: SelfAttention | CrossAttention = (
            SelfAttention(channels, heads, qk_norm)
            if context_width is None
            else CrossAttention(channels, heads, context_width)
        )

    def initialise(self) -> None:
        """Starts with attention that adds nothing."""
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """x (B, C, H, W), and a context (B, L, E) where there is one -> (B, C, H, W)."""
        pixels = self.norm(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        h = self.attention(pixels.flatten(1, 2), *context).unflatten(1, pixels.shape[1:3])
        return scaled(x + h.permute(0, 3, 1, 2), self.skip_scale)


class Stage(nn.Module):
    """A residual block, then self-attention and, if configured, cross-attention.

    A stage is configured as a factory: the U-Net calls it with the facts `in_channels`, `channels`,
    `embedding_width`, `norm` and whether it `attends`; `resample` and `project` make its residual
    block change the resolution. None for `head_channels` is `heads` heads. With `scale_shift` the
    embedding scales and shifts the second norm, and is added to its input without. `skip_scale`
    multiplies the output of each part. `qk_norm` normalises queries and keys of self-attention.
    With `cross_attention` a stage that attends does so to the context too: the embedded noise level
    and the condition's tokens.
    """

    @ranges()
    def __init__(
        self,
        in_channels: int,
        channels: int,
        embedding_width: int,
        attends: bool = False,
        resample: nn.Module | None = None,
        project: bool = False,
        dropout: Annotated[float, between(0, 1)] = 0.0,
        head_channels: Annotated[int | None, optional(whole(1))] = None,
        scale_shift: Flag = False,
        skip_scale: Annotated[float, between(0, 1)] = 1.0,
        cross_attention: Flag = False,
        qk_norm: Flag = False,
        heads: Count = 1,
        norm: Callable[..., GroupNorm] = GroupNorm,
    ):
        super().__init__()
        self.residual = PixelResidual(
            in_channels,
            channels,
            embedding_width,
            dropout,
            scale_shift,
            skip_scale,
            resample,
            project,
            norm,
        )
        self.attention = self.cross = None
        attention = partial(
            PixelAttention, channels, head_channels, skip_scale, heads=heads, norm=norm
        )
        if attends:
            self.attention = attention(qk_norm=qk_norm)
        if attends and cross_attention:
            self.cross = attention(context_width=embedding_width)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E), context (B, L, E) -> (B, C', H', W')."""
        x = self.residual(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, context)
        return x
