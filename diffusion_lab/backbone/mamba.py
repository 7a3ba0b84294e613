"""Mamba over image patches: selective state spaces along paths through the image.

B batch, N tokens, D width, E inner channels, S states, p patch.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.base import Size
from diffusion_lab.backbone.block import AdaLNZero, Block
from diffusion_lab.backbone.patches import PatchNetwork, Route, Routed, patch_grid
from diffusion_lab.backbone.state_space import S6
from diffusion_lab.common.ranges import Count, Flag, one_of, ranges, whole

GATED = partial(AdaLNZero, mlp_ratio=0.0)  # the gate of a mixer takes the place of an MLP


def zigzag_paths(rows: int, columns: int) -> list[Tensor]:
    """The eight serpentine paths through a grid, each a permutation (N,) (arXiv:2403.13802).

    Neighbours on a path are neighbours in the image. Each path runs along the other axis than the
    one before and from another corner, so a few layers see the image from all sides.
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    paths = []
    for flips in ([], [0], [0, 1], [1]):
        opposite = [axis for axis in (0, 1) if axis not in flips]
        for corner in (grid.flip(flips), grid.flip(opposite).T):
            path = corner.clone()
            path[1::2] = corner[1::2].flip(1)
            paths.append(path.flatten())
    return paths


class CausalConv(nn.Module):
    """A depthwise convolution over the tokens up to the present one, then SiLU."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        size, length = len(self.weight), x.shape[1]
        padded = F.pad(x, (0, 0, size - 1, 0))
        # as a sum: the grouped convolution of libraries is slow with the channels last
        weight, y = self.weight.to(x.dtype), self.bias.to(x.dtype)
        for i in range(size):
            y = torch.addcmul(y, padded[:, i : i + length], weight[i])
        return F.silu(y)

    def mixing_macs(self, x: Tensor) -> int:
        return x.numel() * len(self.weight)


class MambaMixer(nn.Module):
    """Mamba's mixer of tokens (B, N, D): a gate, and a short convolution and a scan along a path.

    `state_space` makes the state space of E channels. `path` (M,) is the order of the last M
    tokens; those before them come first. `bidirectional` adds a second convolution and scan, from
    the other end (arXiv:2401.09417).
    """

    def __init__(
        self,
        width: int,
        expand: int,
        conv: int,
        state_space: Callable[[int], nn.Module],
        path: Tensor | None = None,
        bidirectional: bool = False,
    ):
        super().__init__()
        inner = expand * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.forward_scan = nn.Sequential(CausalConv(inner, conv), state_space(inner))
        self.backward_scan = (
            nn.Sequential(CausalConv(inner, conv), state_space(inner)) if bidirectional else None
        )
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.path: Tensor | None
        self.inverse_path: Tensor | None
        self.register_buffer("path", path, persistent=False)
        self.register_buffer(
            "inverse_path", None if path is None else path.argsort(), persistent=False
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `kept` (B, K) are its last tokens' places, if not all M."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, N, E) each
        path, inverse = self.path, self.inverse_path
        if kept is not None and inverse is not None:
            path = inverse[kept].argsort(1)  # (B, K)
            inverse = path.argsort(1)
        y = self._follow(x, path)
        y = (
            self.forward_scan(y)
            if self.backward_scan is None
            else self.forward_scan(y) + self.backward_scan(y.flip(1)).flip(1)
        )
        return self.out_proj(self._follow(y, inverse) * F.silu(gate))

    def _follow(self, x: Tensor, path: Tensor | None) -> Tensor:
        if path is None:
            return x
        free = x.shape[1] - path.shape[-1]
        placed = x[:, free:]
        if path.ndim == 1:
            placed = placed[:, path]
        else:
            placed = placed.gather(1, path[..., None].expand_as(placed))
        return torch.cat([x[:, :free], placed], dim=1) if free else placed


class Mamba(PatchNetwork):
    """Patches through `depth` blocks of a selective state space (arXiv:2312.00752, 2405.21060).

    `path` is zigzag (a layer follows one of eight), bidirectional or raster; `positions` is sincos,
    learned or none; `state_space` makes the state space of some channels; `overlap`, `smooth`,
    `registers`, `routed`, `route` and `fused` are explained at `PatchNetwork`. Raises ValueError
    for sizes that do not divide.
    """

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        patch: Count = 4,
        width: Count = 384,
        depth: Count = 5,
        expand: Count = 2,
        conv: Count = 4,
        path: Annotated[str, one_of("zigzag", "bidirectional", "raster")] = "zigzag",
        positions: Annotated[str, one_of("sincos", "learned", "none")] = "sincos",
        long_skips: Flag = False,
        state_space: Callable[[int], nn.Module] = S6,
        block: Callable[..., Block] = GATED,
        overlap: Flag = False,
        smooth: Flag = False,
        registers: Annotated[int, whole(0)] = 0,
        routed: Routed = 0.0,
        route: Route = (1, -1),
        fused: Flag = False,
    ):
        paths = zigzag_paths(*patch_grid(image_size, patch)) if path == "zigzag" else [None]
        mixer = partial(
            MambaMixer, width, expand, conv, state_space, bidirectional=path == "bidirectional"
        )
        blocks = [
            block(width=width, mixer=partial(mixer, path=paths[i % len(paths)]))
            for i in range(depth)
        ]
        super().__init__(
            in_channels,
            out_channels,
            image_size,
            patch,
            width,
            positions,
            long_skips,
            blocks,
            overlap=overlap,
            smooth=smooth,
            registers=registers,
            routed=routed,
            route=route,
            fused=fused,
        )


class Mamba2(Mamba):
    """A Mamba named after Mamba-2, whose state space its configuration chooses."""
