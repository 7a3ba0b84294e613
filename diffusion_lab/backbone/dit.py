"""DiT: a transformer over image patches (arXiv:2212.09748)."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

from torch import Tensor

from diffusion_lab.backbone.attention import SelfAttention, check_heads
from diffusion_lab.backbone.base import Size
from diffusion_lab.backbone.block import AdaLNZero, Block
from diffusion_lab.backbone.embedding import grid_coordinates, rotary_angles
from diffusion_lab.backbone.patches import PatchNetwork, patch_grid
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
    skips; `overlap`, `smooth`, `registers` and `base_width` are explained at `PatchNetwork`; with
    the last, attention's products are scaled by 8 / d. Raises ValueError for sizes that do not
    divide.
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
    ):
        rows, columns = patch_grid(image_size, patch)
        check_heads(width, heads)
        rotary = positions == "rotary"
        mixer = partial(
            SelfAttention,
            width,
            heads,
            qk_norm=qk_norm,
            angles=rotary_angles(rows, columns, width // heads) if rotary else None,
            mask=None if window is None else window_mask(rows, columns, window),
            scale=None if base_width is None else USUAL_HEAD**0.5 * heads / width,
        )
        places = "none" if rotary else positions
        blocks = [block(width=width, mixer=mixer) for _ in range(depth)]
        super().__init__(
            in_channels,
            out_channels,
            image_size,
            patch,
            width,
            places,
            long_skips,
            blocks,
            overlap,
            smooth,
            registers,
            base_width,
        )
