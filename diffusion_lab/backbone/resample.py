"""Halving and doubling the sides of an image in a U-Net.

B batch, C channels, H W height and width, E width of the noise embedding.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Downsample(nn.Conv2d):
    """Halves both sides: a 3x3 convolution of stride 2 (arXiv:2006.11239)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, H / 2, W / 2); a residual block would use the embedding."""
        return super().forward(x)


class Upsample(nn.Conv2d):
    """Doubles both sides: nearest neighbours, then a 3x3 convolution (arXiv:2006.11239)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W); a residual block would use the embedding."""
        return super().forward(F.interpolate(x, scale_factor=2.0))


class _Filter(nn.Module):
    """The filter [1, 3, 3, 1] along both sides, of sum 1; beyond the border there are zeros."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", taps[:, None] * taps, persistent=False)


class FilterHalve(_Filter):
    """Halves both sides with the filter [1, 3, 3, 1] (arXiv:2011.13456)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H / 2, W / 2)."""
        kernel = self.kernel.expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of the filter."""
        return x.numel() // 4 * self.kernel.numel()


class FilterDouble(_Filter):
    """Doubles both sides with the filter [1, 3, 3, 1] (arXiv:2011.13456)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        kernel = 4 * self.kernel.expand(x.shape[1], 1, 4, 4)  # a quarter of the pixels are given
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of the filter."""
        return x.numel() * self.kernel.numel()


# What a residual block halves and doubles both of its branches with.
HALVE = {"block": partial(nn.AvgPool2d, 2), "fir": FilterHalve}
DOUBLE = {"block": partial(nn.Upsample, scale_factor=2.0), "fir": FilterDouble}


def check_updown(updown: str, projection: bool) -> None:
    """Raises ValueError if a U-Net cannot change resolution so."""
    if updown not in ("conv", *HALVE):
        raise ValueError(f"backbone.updown={updown} is unknown; write conv, block or fir")
    if projection and updown == "conv":
        raise ValueError(
            "backbone.updown_projection=true needs residual blocks that resample; "
            "write backbone.updown=block or backbone.updown=fir with it"
        )
