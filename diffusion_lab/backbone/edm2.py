"""EDM2's U-Net, whose layers all preserve the magnitude of activations (arXiv:2312.02696).

There are no biases and no group norms, and no learned gains but those of the noise embedding and
of the output. The magnitude of a tensor is the root of the mean of its squares. Weights have unit
magnitude too: they are normalised in each forward pass, and `renormalise` puts the stored ones back
after each step of the optimiser, so that the learning rate alone says how far a step turns them.
B batch, C channels, H W height and width, N pixels, D width, h heads, d = D / h, E width of the
embedding.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import attend, split_heads
from diffusion_lab.backbone.base import Size
from diffusion_lab.backbone.conditioning import Attributes, Condition
from diffusion_lab.backbone.resample import BlockResampling
from diffusion_lab.backbone.unet import check_levels
from diffusion_lab.common.ranges import Count, Positive, between, ranges, whole_list

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

    def __init__(self, channels: int, bandwidth: float):
        super().__init__()
        self.frequencies = nn.Buffer(2 * math.pi * bandwidth * torch.randn(channels))
        self.phases = nn.Buffer(2 * math.pi * torch.rand(channels))

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
        return 2 * x.numel() * x.shape[2] * x.shape[3]


RESIDUAL_BALANCE = 0.3  # share of the residual branch in its sum with the skip
ATTENTION_BALANCE = 0.3  # share of attention in its sum with its input
LABEL_BALANCE = 0.5  # share of the condition in its sum with the noise level
CLIP = 256.0  # largest activation, far above 1, so that float16 cannot overflow


class EDM2Stage(nn.Module):
    """A residual block, then attention if it `attends`.

    An encoder's block normalises each pixel of its input, and a decoder's does not. `resample`
    changes the resolution first. A decoder's block joins a skip of `skip_channels` to its input
    unless that is 0.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        embedding_width: int,
        head_channels: int,
        dropout: float,
        attends: bool = False,
        resample: nn.Module | None = None,
        decodes: bool = False,
        skip_channels: int = 0,
    ):
        super().__init__()
        self.decodes = decodes
        self.joins = skip_channels > 0
        self.resample = nn.Identity() if resample is None else resample
        total = in_channels + skip_channels
        self.skip = MPConv(total, channels, 1) if total != channels else nn.Identity()
        self.conv1 = MPConv(total if decodes else channels, channels, 3)
        self.embedding = MPLinear(embedding_width, channels)
        self.gain = nn.Parameter(torch.zeros(1))  # of the embedding
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv(channels, channels, 3)
        self.attention = CosineAttention(channels, head_channels) if attends else None

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), embedding (B, E), skip (B, C', H, W) -> (B, C'', H', W')."""
        x = self.resample(x if skip is None else mp_cat(x, skip))
        if not self.decodes:
            x = normalised(self.skip(x), 1)
        h = self.conv1(mp_silu(x))
        scale = 1 + self.gain * self.embedding(embedding)  # (B, C)
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv2(self.dropout(h))
        if self.decodes:
            x = self.skip(x)
        x = mp_sum(x, h, RESIDUAL_BALANCE)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), ATTENTION_BALANCE)
        return x.clamp(-CLIP, CLIP)


class EDM2UNet(nn.Module):
    """Encoder, middle and decoder of blocks, joined by skip connections.

    `multipliers` times `channels` is the width of each level, finest first, which has `blocks`
    blocks; `attention` lists the levels, from 0, that attend, with heads of `head_channels`. The
    embedding is as wide as the widest level. `bandwidth` is that of its Fourier features: 1 for a
    noise label of log(sigma) / 4. The condition's vector should have unit magnitude, and its tokens
    are not used. Raises ValueError for sizes that do not divide.
    """

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        channels: Count = 32,
        multipliers: Annotated[Sequence[int], whole_list(1, shortest=1)] = (1, 2, 3),
        blocks: Count = 1,
        attention: Annotated[Sequence[int], whole_list(0)] = (2,),
        head_channels: Count = 32,
        dropout: Annotated[float, between(0, 1)] = 0.0,
        bandwidth: Positive = 1.0,
    ):
        super().__init__()
        levels = range(len(multipliers))
        check_levels(image_size, len(levels), attention)
        widths = [channels * multiplier for multiplier in multipliers]
        self.condition_width = max(widths)
        self.features = MPFourier(channels, bandwidth)
        self.noise = MPLinear(channels, max(widths))
        encode = partial(
            EDM2Stage, embedding_width=max(widths), head_channels=head_channels, dropout=dropout
        )
        decode = partial(encode, decodes=True)
        self.entry = MPConv(in_channels + 1, width := channels, 3)
        self.down, skips = nn.ModuleList(), [width]
        for level in levels:
            if level:
                self.down.append(encode(width, width, resample=BlockResampling.halving()))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(encode(width, widths[level], attends=level in attention))
                skips.append(width := widths[level])
        self.middle = nn.ModuleList([decode(width, width, attends=True), decode(width, width)])
        self.up = nn.ModuleList()
        for level in reversed(levels):
            for _ in range(blocks + 1):
                attends, skip = level in attention, skips.pop()
                self.up.append(decode(width, widths[level], attends=attends, skip_channels=skip))
                width = widths[level]
            if level:
                self.up.append(decode(width, width, resample=BlockResampling.doubling()))
        self.out = MPConv(width, out_channels, 3)
        self.gain = nn.Parameter(torch.zeros(1))  # of the output
        self.labelled = True

    def adapt(self, conditioning: nn.Module) -> None:
        """Gives the vectors of labels unit magnitude: their sum, where there are several."""
        self.labelled = bool(conditioning.conditional)
        if isinstance(conditioning, Attributes):
            part = len(conditioning.sizes) ** -0.5
            conditioning.embeddings = nn.ModuleList(
                MPEmbedding(size + 1, self.condition_width, part) for size in conditioning.sizes
            )

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return self.entry, self.out

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.down, *self.middle, *self.up]

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        embedding = self.noise(self.features(noise))  # (B, E)
        if condition.vector is not None:
            embedding = (
                mp_sum(embedding, condition.vector, LABEL_BALANCE)
                if self.labelled
                else embedding + condition.vector  # of a jump or augmentation, 0 if there is none
            )
        embedding = mp_silu(embedding)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        x = self.entry(x)
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        skips = [x]
        for stage in self.down:
            skips.append(x := stage(x, embedding))
        for stage in self.middle:
            x = stage(x, embedding)
        for stage in self.up:
            x = stage(x, embedding, skips.pop() if stage.joins else None)
        return self.gain * self.out(x)
