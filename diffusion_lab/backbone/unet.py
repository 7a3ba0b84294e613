"""U-Nets from DDPM's to EDM's and ADM's (arXiv:2006.11239, 2206.00364, 2105.05233).

B batch, C channels, H W height and width, E width of the noise embedding.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import NoiseEmbedding
from diffusion_lab.backbone.norm import GroupNormSiLU
from diffusion_lab.backbone.options import check_flags, check_list, check_number, check_sizes
from diffusion_lab.backbone.resample import DOUBLE, HALVE, Downsample, Upsample, check_updown
from diffusion_lab.backbone.unet_blocks import (
    AttentionBlock,
    CrossAttentionBlock,
    Layer,
    ResidualBlock,
)


class UNet(nn.Module):
    """Encoder, middle and decoder, joined by skip connections.

    `multipliers` times `channels` is the width of each level, finest first; `attention` lists the
    levels, from 0, with self-attention, which with `attend_once` the decoder has in a level's last
    block only; None for `head_channels` is a single head. With `patch` p the network works on
    blocks of p x p pixels. `updown`: a convolution changes the resolution (conv), or a residual
    block that averages (block) or filters (fir), with `updown_projection` by a 1x1 convolution of
    its skip. `scale_shift`: the embedding scales and shifts the second norm. Each block's output is
    multiplied by `skip_scale`. With `cross_attention`, what attends does so to the condition too:
    to the embedded noise level and the tokens. Raises ValueError for sizes that do not divide.
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
        updown: str = "conv",
        updown_projection: bool = False,
        scale_shift: bool = False,
        skip_scale: float = 1.0,
        attend_once: bool = False,
        cross_attention: bool = False,
    ):
        super().__init__()
        check_unet(channels, multipliers, blocks, attention, head_channels, dropout)
        check_sizes(patch=patch)
        check_number("skip_scale", skip_scale, 0, 1)
        check_flags(
            updown_projection=updown_projection,
            scale_shift=scale_shift,
            attend_once=attend_once,
            cross_attention=cross_attention,
        )
        levels = len(multipliers)
        check_levels(image_size, levels, attention, patch)
        if channels % 4:
            raise ValueError(
                f"backbone.channels={channels} is not a multiple of 4; write one that is"
            )
        check_updown(updown, updown_projection)
        widths = [channels * multiplier for multiplier in multipliers]
        embedding_width = 4 * channels
        self.condition_width = embedding_width
        self.patch = patch
        self.noise = NoiseEmbedding(channels, embedding_width)
        residual = partial(
            ResidualBlock,
            embedding_width=embedding_width,
            dropout=dropout,
            scale_shift=scale_shift,
            skip_scale=skip_scale,
        )

        def layer(inputs: int, width: int, attends: bool) -> Layer:
            block = residual(inputs, width)
            if not attends:
                return Layer(block)
            attend = AttentionBlock(width, head_channels, skip_scale)
            if not cross_attention:
                return Layer(block, attend)
            cross = CrossAttentionBlock(width, head_channels, embedding_width, skip_scale)
            return Layer(block, attend, cross)

        resampling = partial(residual, project=updown_projection)

        def halve(width: int) -> nn.Module:
            if updown == "conv":
                return Downsample(width)
            return resampling(width, width, resample=HALVE[updown]())

        def double(width: int) -> nn.Module:
            if updown == "conv":
                return Upsample(width)
            return resampling(width, width, resample=DOUBLE[updown]())

        self.entry = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width := channels]
        for level in range(levels):
            for _ in range(blocks):
                self.down.append(layer(width, widths[level], level in attention))
                skips.append(width := widths[level])
            if level < levels - 1:
                self.down.append(halve(width))
                skips.append(width)
        self.middle = nn.ModuleList([layer(width, width, True), layer(width, width, False)])
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(blocks + 1):
                attends = level in attention and (i == blocks or not attend_once)
                self.up.append(layer(width + skips.pop(), widths[level], attends))
                width = widths[level]
            if level > 0:
                self.up.append(double(width))
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
            elif isinstance(module, AttentionBlock | CrossAttentionBlock):
                nn.init.zeros_(module.attention.out.weight)
        nn.init.zeros_(self.out.weight)

    @property
    def layers(self) -> list[nn.Module]:
        """What is called one after another."""
        return [*self.down, *self.middle, *self.up]

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W)."""
        embedding = self.noise(noise)
        context = embedding[:, None]
        if condition.tokens is not None:
            context = torch.cat([context, condition.tokens], dim=1)  # (B, L, E)
        if condition.vector is not None:
            embedding = embedding + condition.vector
        embedding = F.silu(embedding)  # (B, E)
        x = self.entry(F.pixel_unshuffle(x, self.patch))
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding, context) if isinstance(layer, Layer) else layer(x, embedding)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, embedding, context)
        for layer in self.up:
            if isinstance(layer, Layer):
                x = layer(torch.cat([x, skips.pop()], dim=1), embedding, context)
            else:
                x = layer(x, embedding)
        return F.pixel_shuffle(self.out(self.norm(x)), self.patch)


def check_unet(
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    head_channels: int | None,
    dropout: float,
) -> None:
    """Raises ValueError, naming the key, for what no U-Net can have."""
    check_sizes(channels=channels, blocks=blocks)
    check_list("multipliers", multipliers, 1)
    check_list("attention", attention, 0)
    if not multipliers:
        raise ValueError("backbone.multipliers=[] leaves no levels; write one number a level")
    if head_channels is not None:  # null: a single head
        check_sizes(head_channels=head_channels)
    check_number("dropout", dropout, 0, 1)


def check_levels(
    image_size: tuple[int, int], levels: int, attention: Sequence[int], patch: int = 1
) -> None:
    """Raises ValueError if a U-Net cannot have so many levels, or these with attention."""
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
    for level in attention:
        if not 0 <= level < levels:
            raise ValueError(
                f"backbone.attention names level {level}, and this U-Net has levels 0 to "
                f"{levels - 1}; write some of these"
            )
