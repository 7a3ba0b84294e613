"""Layers that preserve magnitude: unit variance in, unit variance out (arXiv:2312.02696).

The magnitude of a tensor is the root of the mean of its squares. Weights have unit magnitude too:
they are normalised in each forward pass, and `renormalise` puts the stored ones back after each
step of the optimiser, so that the learning rate alone says how far a step turns them.
B batch, C channels, H W height and width, N pixels, D width, h heads, d = D / h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import attend, split_heads

EPS = 1e-4  # added to a magnitude before it divides
SILU_MAGNITUDE = 0.596  # of silu(x) for x of a standard normal distribution


def normalised(x: Tensor, *dims: int) -> Tensor:
    """Divides x by its magnitude over `dims`, which is computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    magnitude = norm / math.sqrt(x.numel() // norm.numel())
    return x / (magnitude + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, of unit magnitude for a standard normal x (equation 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """(1 - balance) a + balance b, of unit magnitude if a and b are uncorrelated (equation 88)."""
    scale = math.hypot(1 - balance, balance)
    return torch.add(a * ((1 - balance) / scale), b, alpha=balance / scale)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Joins the channels of a (B, C, ...) and b (B, C', ...), of unit magnitude (equation 103).

    What follows hears both equally, however many channels they have.
    """
    total = a.shape[1] + b.shape[1]
    return torch.cat([x * math.sqrt(total / (2 * x.shape[1])) for x in (a, b)], dim=1)


class UnitWeights:
    """A layer whose weights have unit magnitude: `unit` gives them, and the stored ones follow."""

    weight: Tensor

    def unit(self) -> Tensor:
        """The stored weights, normalised."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws new weights, as PyTorch's layers do when they are made."""
        nn.init.normal_(self.weight)
        self.renormalise()

    @torch.no_grad()
    def renormalise(self, unless: Tensor | None = None) -> None:
        """Gives the stored weights unit magnitude, unless a bool () on their device is true."""
        unit = self.unit()
        self.weight.copy_(unit if unless is None else torch.where(unless, self.weight, unit))


class MPLinear(UnitWeights, nn.Linear):
    """A linear layer without a bias; the weights (D) of each output have unit magnitude."""

    def __init__(self, width: int, out_width: int):
        super().__init__(width, out_width, bias=False)

    def unit(self) -> Tensor:
        return normalised(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D')."""
        return F.linear(x, self.unit() / math.sqrt(self.in_features))


class MPConv(UnitWeights, nn.Conv2d):
    """A convolution of side 1 or 3 without a bias; an output's weights have unit magnitude."""

    def __init__(self, in_channels: int, channels: int, side: int):
        super().__init__(in_channels, channels, side, padding=side // 2, bias=False)

    def unit(self) -> Tensor:
        return normalised(self.weight, 1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H, W)."""
        return self._conv_forward(x, self.unit() / math.sqrt(self.weight[0].numel()), None)


class MPEmbedding(UnitWeights, nn.Embedding):
    """Label vectors of magnitude `size`: a table of classes, and a last row for no class.

    The table is the weight of a linear layer on one-hot labels times the root of their number, so
    each of its columns has unit magnitude over the classes. The last row has it by itself.
    """

    def __init__(self, rows: int, width: int, size: float = 1.0):
        super().__init__(rows, width)
        self.size = size

    def unit(self) -> Tensor:
        classes, null = self.weight[:-1], self.weight[-1:]
        return torch.cat([normalised(classes, 0), normalised(null, 1)])

    def forward(self, labels: Tensor) -> Tensor:
        """labels (B,) -> (B, D)."""
        return F.embedding(labels, self.unit()) * self.size


class MPFourier(nn.Module):
    """Cosines of a noise label (B,) of unit magnitude, (B, channels) float32 (equation 75).

    Frequencies are normally distributed with deviation `bandwidth`, in cycles per unit of the
    label; they and the phases are drawn once and saved with the weights, in radians.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise: Tensor) -> Tensor:
        """noise (B,) float32 -> (B, channels)."""
        return math.sqrt(2) * (noise[:, None] * self.frequencies + self.phases).cos()


class CosineAttention(nn.Module):
    """Self-attention of pixels with normalised queries, keys and values, (B, C, H, W) -> the same.

    Raises ValueError if `head_channels` do not divide the channels.
    """

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} must divide the {channels} channels of a level, as "
                f"{channels} does"
            )
        self.heads = channels // head_channels
        self.qkv = MPLinear(channels, 3 * channels)
        self.out = MPLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        parts = split_heads(self.qkv(pixels.flatten(1, 2)), 3, self.heads)  # (B, h, N, d) each
        q, k, v = (normalised(part, -1) for part in parts)
        mixed = self.out(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)
        return mixed.unflatten(1, pixels.shape[1:3]).permute(0, 3, 1, 2)

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-accumulates between pixels: the scores, and the sum of values by them."""
        return 2 * x.numel() * x.shape[2] * x.shape[3]
