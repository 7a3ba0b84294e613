"""DDPM's U-Net: residual blocks with self-attention at some resolutions (arXiv:2006.11239).

B batch, C channels, H W height and width, E width of the noise embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import SelfAttention
from diffusion_lab.backbone.embedding import NoiseEmbedding
from diffusion_lab.backbone.norm import GroupNorm, GroupNormSiLU
from diffusion_lab.conditioning import Condition


class ResidualBlock(nn.Module):
    """Two convolutions, with the embedding added between them."""

    def __init__(self, in_channels: int, channels: int, embedding_width: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_width, channels)
        self.norm2 = GroupNormSiLU(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) -> (B, C', H, W)."""
        h = self.conv1(self.norm1(x))
        h = self.norm2(h, shift=self.embedding(embedding))
        return self.skip(x) + self.conv2(self.dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int | None):
        super().__init__()
        if head_channels is not None and channels % head_channels:
            raise ValueError(
                f"heads of {head_channels} channels do not divide a level of {channels}; "
                f"write a backbone.head_channels that does, or null for a single head"
            )
        self.norm = GroupNorm(channels)
        self.attention = SelfAttention(channels, channels // (head_channels or channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        tokens = self.norm(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        h = self.attention(tokens.flatten(1, 2)).unflatten(1, tokens.shape[1:3])
        return x + h.permute(0, 3, 1, 2)


class Upsample(nn.Conv2d):
    """Doubles both sides: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0))


class Layer(nn.Module):
    """A residual block, and self-attention where a level has it."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module):
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) -> (B, C', H, W)."""
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """Encoder, middle and decoder, joined by skip connections.

    `multipliers` times `channels` is the width of each level, finest first; `attention` lists the
    levels, from 0, with self-attention; None for `head_channels` is a single head. With `patch` p
    the network works on blocks of p x p pixels. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        head_channels: int | None,
        dropout: float,
        patch: int,
    ):
        super().__init__()
        levels = len(multipliers)
        _check_sizes(image_size, levels, patch)
        for level in attention:
            if not 0 <= level < levels:
                raise ValueError(
                    f"backbone.attention names level {level}, and this U-Net has levels 0 to "
                    f"{levels - 1}; write some of these"
                )
        if channels % 4:
            raise ValueError(
                f"backbone.channels={channels} is not a multiple of 4; write one that is"
            )
        widths = [channels * multiplier for multiplier in multipliers]
        embedding_width = 4 * channels
        self.condition_width = embedding_width
        self.patch = patch
        self.noise = NoiseEmbedding(channels, embedding_width)

        def layer(level: int, inputs: int) -> Layer:
            width = widths[level]
            attend = AttentionBlock(width, head_channels) if level in attention else nn.Identity()
            return Layer(ResidualBlock(inputs, width, embedding_width, dropout), attend)

        self.entry = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width := channels]
        for level in range(levels):
            for _ in range(blocks):
                self.down.append(layer(level, width))
                skips.append(width := widths[level])
            if level < levels - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                Layer(
                    ResidualBlock(width, width, embedding_width, dropout),
                    AttentionBlock(width, head_channels),
                ),
                Layer(ResidualBlock(width, width, embedding_width, dropout), nn.Identity()),
            ]
        )
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(layer(level, width + skips.pop()))
                width = widths[level]
            if level > 0:
                self.up.append(Upsample(width))
        self.norm = GroupNormSiLU(width)
        self.out = nn.Conv2d(width, out_channels * patch**2, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():  # every branch starts as nothing added
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AttentionBlock):
                nn.init.zeros_(module.attention.out.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W)."""
        embedding = self.noise(noise)
        if condition.vector is not None:
            embedding = embedding + condition.vector
        embedding = F.silu(embedding)  # (B, E)
        x = self.entry(F.pixel_unshuffle(x, self.patch))
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding) if isinstance(layer, Layer) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, embedding)
        for layer in self.up:
            if isinstance(layer, Layer):
                x = layer(torch.cat([x, skips.pop()], dim=1), embedding)
            else:
                x = layer(x)
        return F.pixel_shuffle(self.out(self.norm(x)), self.patch)


def _check_sizes(image_size: tuple[int, int], levels: int, patch: int) -> None:
    height, width = image_size
    if height % patch or width % patch:
        raise ValueError(
            f"blocks of {patch}x{patch} pixels do not tile a {height}x{width} image; "
            f"write a backbone.patch that divides both sides"
        )
    fitting = 1
    while (height // patch) % 2**fitting == 0 and (width // patch) % 2**fitting == 0:
        fitting += 1
    if levels > fitting:
        raise ValueError(
            f"a U-Net of {levels} levels halves the image {levels - 1} times, which "
            f"{height}x{width} at patch {patch} does not allow; "
            f"write at most {fitting} backbone.multipliers"
        )
