"""Group normalisation (arXiv:1803.08494), also fast in bfloat16 on a CPU.

B batch, H W height and width, C channels, G groups, c = C / G.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion_lab.common import forward_mode
from diffusion_lab.common.ranges import Count, Positive, optional, ranges, whole


def _pixel_mean(x: Tensor, groups: int) -> Tensor:
    """Mean of x (B, H, W, C) over the pixels, (B, G, c), float32 at least."""
    # row by row in x's type, the fast path: where means cancel, bfloat16 may round short sums only
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.sum(2).sum(1, dtype=dtype).unflatten(1, (groups, -1))
    return total / (x.shape[1] * x.shape[2])


def _pixel_sum(x: Tensor, groups: int) -> Tensor:
    """Sum of x (B, H, W, C) over the pixels, (B, G, c), float32 at least but rounded as x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.sum((1, 2)).to(dtype).unflatten(1, (groups, -1))


def _broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient (B, G, c) in x's type, to multiply x (B, H, W, C)."""
    return coefficient.flatten(1).to(x.dtype)[:, None, None]


class _GroupNorm(torch.autograd.Function):
    """group_norm(x + shift), then SiLU if asked, for x (B, H, W, C) and shift (B, C) or None.

    Per sample and channel it is scale x + offset = weight (x + centre) / deviation + bias.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu):
        weight, bias = weight.view(groups, -1), bias.view(groups, -1)
        mean, square = _pixel_mean(x, groups), _pixel_mean(x.square(), groups)
        added = 0.0
        if shift is not None:  # the shift is free here, and costs a pass over the image elsewhere
            added = shift.to(mean.dtype).view(mean.shape)
            square = square + added * (2 * mean + added)
        group_mean = (mean + added).mean(2, keepdim=True)
        variance = square.mean(2, keepdim=True) - group_mean.square()
        # a variance that x's type cannot resolve is all rounding error, and may be negative
        floor = (torch.finfo(x.dtype).eps * group_mean).square()
        inverse = (torch.maximum(variance, floor) + eps).rsqrt()
        centre = added - group_mean
        scale = inverse * weight
        y = torch.addcmul(_broadcast(bias + centre * scale, x), x, _broadcast(scale, x))
        ctx.save_for_backward(x, y, weight, mean, centre.expand(mean.shape), inverse)
        ctx.groups, ctx.silu, ctx.shifted = groups, silu, shift is not None
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, weight, mean, centre, inverse = ctx.saved_tensors
        pixels = x.shape[1] * x.shape[2]
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, y)
        grad_bias = _pixel_sum(grad, ctx.groups)
        grad_weight = (_pixel_sum(grad * x, ctx.groups) + centre * grad_bias) * inverse
        scale = inverse * weight
        slope = (grad_weight * weight).mean(2, keepdim=True) * inverse.square() / -pixels
        offset = (grad_bias * scale).mean(2, keepdim=True) / -pixels + centre * slope
        grad_x = torch.addcmul(_broadcast(offset, x), x, _broadcast(slope.expand(scale.shape), x))
        grad_x = grad_x.addcmul_(grad, _broadcast(scale, x))
        grad_shift = None
        if ctx.shifted:
            grad_shift = (scale * grad_bias + pixels * (slope * mean + offset)).flatten(1)
        grads = grad_weight.sum(0).flatten(), grad_bias.sum(0).flatten()
        return grad_x, grad_shift, *grads, None, None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm of x + shift, then SiLU if asked.

    It has gcd(32, channels // 4) groups, a power of two: 32 of 128 channels, 1 of 36. Or it has
    `groups`, fewer where they would have less than `least` channels. Raises ValueError if those do
    not divide the channels.
    """

    @ranges()
    def __init__(
        self,
        channels: int,
        silu: bool = False,
        groups: Annotated[int | None, optional(whole(1))] = None,
        least: Count = 4,
        eps: Positive = 1e-6,
    ):
        count = math.gcd(32, channels // 4)
        if groups is not None:
            count = max(1, min(groups, channels // least))
            if channels % count:
                raise ValueError(
                    f"groups={groups} makes {count} groups of {channels} channels, which do not "
                    "divide; write another number, or null"
                )
        super().__init__(count, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), shift (B, C) -> (B, C, H, W)."""
        fast = x.device.type == "cpu" and x.dtype == torch.bfloat16
        if fast and not forward_mode.is_taken():
            # PyTorch's kernel takes 4 times as long on a channels_last image in this type
            x = x.permute(0, 2, 3, 1)
            settings = (self.num_groups, self.eps, self.silu)
            return _GroupNorm.apply(x, shift, self.weight, self.bias, *settings).permute(0, 3, 1, 2)
        x = x if shift is None else x + shift[:, :, None, None]
        if forward_mode.is_taken():  # the kernel has it for a contiguous float32 image alone
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = super().forward(wide.contiguous()).to(x.dtype)
        else:
            x = super().forward(x)
        return F.silu(x) if self.silu else x
