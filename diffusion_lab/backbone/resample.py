"""Halving and doubling the sides of an image in a U-Net.

B batch, C channels, H W height and width, E width of the noise embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.common.ranges import flag, ranges


def downsample(channels: int) -> nn.Conv2d:
    """Halves both sides: a 3x3 convolution of stride 2 (arXiv:2006.11239)."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Doubles both sides: nearest neighbours, then a 3x3 convolution (arXiv:2006.11239)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0))


class _Filter(nn.Module):
    """The filter [1, 3, 3, 1] along both sides, of sum 1; beyond the border there are zeros."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.kernel = nn.Buffer(taps[:, None] * taps, persistent=False)


class FilterHalve(_Filter):
    """Halves both sides with the filter [1, 3, 3, 1] (arXiv:2011.13456).

    Without `padding` the sides are one pixel shorter.
    """

    def __init__(self, padding: int = 1):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H / 2, W / 2)."""
        kernel = self.kernel.expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])

    def mixing_macs(self, x: Tensor) -> int:
        rows, columns = (side // 2 - 1 + self.padding for side in x.shape[2:])
        return x.shape[0] * x.shape[1] * rows * columns * self.kernel.numel()


class FilterDouble(_Filter):
    """Doubles both sides with the filter [1, 3, 3, 1] (arXiv:2011.13456)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        kernel = 4 * self.kernel.expand(x.shape[1], 1, 4, 4)  # a quarter of the pixels are given
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])

    def mixing_macs(self, x: Tensor) -> int:
        return x.numel() * self.kernel.numel()


class Unconditioned(nn.Module):
    """Wraps a module that takes x only, so that it can be called like a stage."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H', W')."""
        return self.module(x)


class Resampling(ABC):
    """The way in which a U-Net changes its resolution: two modules of its width.

    `stage(in_channels, channels, resample=..., project=...)` makes a stage that resamples.
    """

    @abstractmethod
    def halve(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        """The module that halves both sides, called with x, embedding and context."""

    @abstractmethod
    def double(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        """The module that doubles both sides, called with x, embedding and context."""


class ConvResampling(Resampling):
    """Convolutions alone (arXiv:2006.11239)."""

    def halve(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        return Unconditioned(downsample(width))

    def double(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        return Unconditioned(Upsample(width))


class BlockResampling(Resampling):
    """Residual blocks that average and repeat pixels in both branches (arXiv:2105.05233).

    With `projection` a 1x1 convolution is on their skips (arXiv:2011.13456).
    """

    halving: Callable[[], nn.Module] = partial(nn.AvgPool2d, 2)
    doubling: Callable[[], nn.Module] = partial(nn.Upsample, scale_factor=2.0)

    @ranges(projection=flag())
    def __init__(self, projection: bool = False):
        self.projection = projection

    def halve(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        return stage(width, width, resample=self.halving(), project=self.projection)

    def double(self, width: int, stage: Callable[..., nn.Module]) -> nn.Module:
        return stage(width, width, resample=self.doubling(), project=self.projection)


class FilterResampling(BlockResampling):
    """Residual blocks that filter with [1, 3, 3, 1] in both branches (arXiv:2011.13456)."""

    halving = FilterHalve
    doubling = FilterDouble
