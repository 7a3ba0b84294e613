"""Convolutional encoder and decoder of images (as in arXiv:2112.10752, smaller).

B batch, C channels, H W height and width, f the factor 2^(levels - 1).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import Upsample, downsample
from diffusion_lab.backbone.stage import PixelAttention


class ConvBlock(nn.Module):
    """x + two convolutions of x, the last 0 at first; x is convolved (1x1) if channels change."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, silu=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels, silu=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H, W)."""
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Network(nn.Sequential):
    """Layers in sequence; on a CPU in channels-last layout, where convolutions are then faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def level(in_channels: int, channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    """Builds the residual blocks of a level, and its attention if asked."""
    widths = [in_channels] + [channels] * blocks
    layers: list[nn.Module] = [ConvBlock(*pair) for pair in pairwise(widths)]
    return [*layers, PixelAttention(channels, None)] if attention else layers


class Encoder(Network):
    """Images (B, C, H, W) -> (B, out_channels, H / f, W / f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, attend: bool
    ):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        width = widths[0]
        for depth, wider in enumerate(widths):
            if depth:
                layers.append(downsample(width))
            layers += level(width, wider, blocks, attend and depth == len(widths) - 1)
            width = wider
        super().__init__(
            *layers, GroupNorm(width, silu=True), nn.Conv2d(width, out_channels, 3, padding=1)
        )


class Decoder(Network):
    """Latents (B, in_channels, h, w) -> images (B, C, f h, f w)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, attend: bool
    ):
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
        for depth in reversed(range(len(widths))):
            # narrow before upsampling, which costs a quarter
            narrower = widths[max(depth - 1, 0)]
            layers += level(width, narrower, blocks, attend and depth == len(widths) - 1)
            width = narrower
            if depth:
                layers.append(Upsample(width))
        super().__init__(
            *layers, GroupNorm(width, silu=True), nn.Conv2d(width, out_channels, 3, padding=1)
        )

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the convolution that makes the image."""
        return self[-1].get_parameter("weight")


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Repeats the last row and column of images (B, C, H, W) until `factor` divides both sides."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
