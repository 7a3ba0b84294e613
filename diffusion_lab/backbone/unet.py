"""U-Nets from DDPM's to EDM's and ADM's (arXiv:2006.11239, 2206.00364, 2105.05233).

B batch, C channels, H W height and width, E width of the noise embedding, L tokens of the context.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import CrossAttention
from diffusion_lab.backbone.base import Size, height_and_width, initialise
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import UNetEmbedding
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.patches import patch_grid
from diffusion_lab.backbone.resample import ConvResampling, FilterHalve, Resampling
from diffusion_lab.backbone.stage import Stage
from diffusion_lab.common.ranges import Count, Flag, ranges, whole_list

PLAIN, BY_CONVOLUTION = partial(Stage, head_channels=32), ConvResampling()


class UpLevel(nn.Module):
    """The stages of a decoder level, each joined by a skip, and a module that doubles the sides."""

    def __init__(self, stages: Sequence[nn.Module], upsample: nn.Module | None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.upsample = upsample

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.stages] if self.upsample is None else [*self.stages, self.upsample]

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W'); takes the last of the skips."""
        for stage in self.stages:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding, context)
        return x if self.upsample is None else self.upsample(x, embedding, context)


class UNet(nn.Module):
    """Encoder, middle and decoder of stages, joined by skip connections.

    `multipliers` times `channels` is the width of each level, finest first, which has `blocks`
    stages; `attention` lists the levels, from 0, that attend; with `attend_once` the decoder
    attends in a level's last stage only. With `patch` p the network works on blocks of p x p
    pixels. `resample` changes the resolution. With `pyramid` each level but the finest also gets
    the image itself, halved by convolutions (arXiv:2011.13456). Raises ValueError for sizes that do
    not divide, and for cross-attention to a condition that has no tokens.
    """

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        channels: Count = 32,
        multipliers: Annotated[Sequence[int], whole_list(1, shortest=1)] = (1, 2, 2),
        blocks: Count = 2,
        attention: Annotated[Sequence[int], whole_list(0)] = (2,),
        attend_once: Flag = False,
        patch: Count = 1,
        stage: Callable[..., Stage] = PLAIN,
        resample: Resampling = BY_CONVOLUTION,
        pyramid: Flag = False,
        embedding: Callable[..., UNetEmbedding] = UNetEmbedding,
        norm: Callable[..., GroupNorm] = GroupNorm,
    ):
        super().__init__()
        levels = len(multipliers)
        check_levels(image_size, levels, attention, patch)
        if channels % 4:
            raise ValueError(f"channels={channels} must be a multiple of 4")
        widths = [channels * multiplier for multiplier in multipliers]
        self.patch = patch
        self.noise = embedding(channels)
        stage = partial(stage, embedding_width=self.noise.width, norm=norm)
        self.entry = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width := channels]
        for level in range(levels):
            for _ in range(blocks):
                self.down.append(stage(width, widths[level], attends=level in attention))
                skips.append(width := widths[level])
            if level < levels - 1:
                self.down.append(resample.halve(width, stage))
                skips.append(width)
        self.middle = nn.ModuleList([stage(width, width, attends=True), stage(width, width)])
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            stages = []
            for i in range(blocks + 1):
                attends = level in attention and (i == blocks or not attend_once)
                stages.append(stage(width + skips.pop(), widths[level], attends=attends))
                width = widths[level]
            self.up.append(UpLevel(stages, resample.double(width, stage) if level else None))
        self._check_tokens()
        self.pyramid = image_pyramid(self.entry.in_channels, widths[:-1] if pyramid else [], blocks)
        self.norm = norm(width, silu=True)
        self.out = nn.Conv2d(width, out_channels * patch**2, 3, padding=1)
        initialise(self)

    def _check_tokens(self) -> None:
        attends = any(isinstance(module, CrossAttention) for module in self.modules())
        if attends and self.noise.condition_first:
            raise ValueError(
                "cross-attention would have one token, to which an embedding with condition_first "
                "adds up noise level and label; write condition_first=false"
            )

    def initialise(self) -> None:
        """Starts with an output of 0."""
        nn.init.zeros_(self.out.weight)

    @property
    def condition_width(self) -> int:
        return self.noise.condition_width

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return self.entry, self.out

    @property
    def layers(self) -> list[nn.Module]:
        levels = [level for level in self.up if isinstance(level, UpLevel)]
        return [*self.down, *self.middle, *(layer for level in levels for layer in level.layers)]

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        if self.noise.condition_first:
            embedding = self.noise(noise, condition.vector)  # (B, E)
            context = embedding[:, None]
        else:
            embedding, context = condition.after(self.noise(noise))  # (B, E), (B, L, E)
        embedding = F.silu(embedding)  # (B, E)
        image = F.pixel_unshuffle(x, self.patch)
        x = self.entry(image)
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        skips = [x]
        for i, stage in enumerate(self.down):
            x = stage(x, embedding, context)
            if str(i) in self.pyramid:
                x = image = (x + self.pyramid[str(i)](image)) * math.sqrt(0.5)
            skips.append(x)
        for stage in self.middle:
            x = stage(x, embedding, context)
        for level in self.up:
            x = level(x, skips, embedding, context)
        return F.pixel_shuffle(self.out(self.norm(x)), self.patch)


def image_pyramid(channels: int, widths: Sequence[int], blocks: int) -> nn.ModuleDict:
    """The modules that halve the image, for levels of these widths with `blocks` stages.

    Each is a 3x3 convolution, then the filter [1, 3, 3, 1] (arXiv:2011.13456), and has the index of
    the module in the encoder that halves at the same place.
    """
    pyramid = nn.ModuleDict()
    for level, width in enumerate(widths, 1):
        # a pixel of the padding is the convolution's, and one the filter's
        convolution = nn.Conv2d(channels, width, 3, padding=2)
        pyramid[str(level * (blocks + 1) - 1)] = nn.Sequential(convolution, FilterHalve(padding=0))
        channels = width
    return pyramid


def check_levels(image_size: Size, levels: int, attention: Sequence[int], patch: int = 1) -> None:
    """Raises ValueError if the image is too small for the levels, or attention is at another."""
    sides = math.gcd(*patch_grid(image_size, patch))
    fitting = (sides & -sides).bit_length()  # 1 + how often 2 divides both sides
    if levels > fitting:
        height, width = height_and_width(image_size)
        raise ValueError(
            f"multipliers must have at most {fitting} entries: {levels} levels halve the sides "
            f"{levels - 1} times, which {height}x{width} pixels at patch {patch} do not allow"
        )
    for level in attention:
        if level >= levels:
            raise ValueError(
                f"attention={[*attention]} includes level {level}, but the U-Net has levels 0 to "
                f"{levels - 1}"
            )
