"""DiT: a transformer over image patches (arXiv:2212.09748)."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

from torch import Tensor

from diffusion_lab.backbone.attention import SelfAttention, check_heads
from diffusion_lab.backbone.base import Size
from diffusion_lab.backbone.block import AdaLNZero, Block
from diffusion_lab.backbone.embedding import grid_coordinates, rotary_angles
from diffusion_lab.backbone.patches import PatchNetwork, Route, Routed, patch_grid
from diffusion_lab.common.ranges import Count, Flag, one_of, optional, ranges, whole

USUAL_HEAD = 64  # the width of a head at which muP's scale of attention is the usual one


def window_mask(rows: int, columns: int, window: int) -> Tensor:
    """The mask (N, N) that lets patches attend to those at most `window` rows and columns away."""
    places = grid_coordinates(rows, columns)  # (N, 2)
    return (places[:, None] - places[None]).abs().amax(2) <= window


class DiT(PatchNetwork):
    """Patches through `depth` blocks of self-attention.

    `positions` is sincos, sines_first, learned or rotary; `qk_norm` normalises queries and keys;
    `window`, if given, is how many rows and columns away a patch attends; `long_skips` adds U-ViT's
    skips; `overlap`, `smooth`, `registers`, `base_width`, `routed` and `route` are explained at
    `PatchNetwork`; with a base width, attention's products are scaled by 8 / d. Raises ValueError
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
        depth: Count = 3,
        heads: Count = 6,
        positions: Annotated[str, one_of("sincos", "sines_first", "learned", "rotary")] = "sincos",
        qk_norm: Flag = False,
        window: Annotated[int | None, optional(whole(1))] = None,
        long_skips: Flag = False,
        block: Callable[..., Block] = AdaLNZero,
        overlap: Flag = False,
        smooth: Flag = False,
        registers: Annotated[int, whole(0)] = 0,
        base_width: Annotated[int | None, optional(whole(1))] = None,
        routed: Routed = 0.0,
        route: Route = (1, -1),
    ):
        rows, columns = patch_grid(image_size, patch)
        check_heads(width, heads)
        if routed and window is not None:
            raise ValueError(f"routed={routed} takes patches out of a window; write window=null")
        angles = rotary_angles(rows, columns, width // heads) if positions == "rotary" else None
        attention = partial(SelfAttention, width, heads, qk_norm, angles)
        mixer = partial(
            attention,
            mask=None if window is None else window_mask(rows, columns, window),
            scale=None if base_width is None else USUAL_HEAD**0.5 * heads / width,
        )
        super().__init__(
            in_channels,
            out_channels,
            image_size,
            patch,
            width,
            positions if angles is None else "none",
            long_skips,
            [block(width=width, mixer=mixer) for _ in range(depth)],
            overlap,
            smooth,
            registers,
            base_width,
            routed,
            route,
        )
