"""Networks on patches, such as DiT: image -> tokens -> blocks -> image (arXiv:2212.09748).

B batch, N patches, L condition tokens, D width, p patch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import SelfAttention, check_heads
from diffusion_lab.backbone.base import Size, height_and_width, initialise
from diffusion_lab.backbone.block import AdaLNZero, Block, modulate
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import (
    NoiseEmbedding,
    grid_coordinates,
    grid_positions,
    rotary_angles,
)
from diffusion_lab.common.ranges import (
    Count,
    Flag,
    between,
    numbers,
    one_of,
    optional,
    ranges,
    whole,
)

FREQUENCIES = 256  # numbers in the sinusoid of the noise embedding
Routed = Annotated[float, between(0, 0.95)]
Route = Annotated[
    Sequence[int],
    numbers("two whole numbers", lambda ends: [*map(type, ends)] == [int, int]).as_in([1, -1]),
]


def patchify(x: Tensor, patch: int) -> Tensor:
    """Image (B, C, H, W) -> patches (B, N, C p^2), row by row."""
    return F.pixel_unshuffle(x, patch).flatten(2).mT


def unpatchify(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """Patches (B, N, C p^2) in `rows` rows -> image (B, C, H, W)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (rows, -1)), patch)


def patch_grid(image_size: Size, patch: int) -> tuple[int, int]:
    """Rows and columns of patches; raises ValueError if they do not tile the image."""
    height, width = height_and_width(image_size)
    if height % patch or width % patch:
        raise ValueError(
            f"patch={patch} must divide both sides of the image, which has {height}x{width} pixels"
        )
    return height // patch, width // patch


def embedding(in_channels: int, width: int, patch: int, overlap: bool) -> nn.Module:
    """The layer that embeds patches, with `overlap` together with half a patch on each side."""
    if not overlap:
        return nn.Linear(in_channels * patch**2, width)
    around = max(1, patch // 2)  # pixels
    return nn.Conv2d(in_channels, width, patch + 2 * around, stride=patch, padding=around)


def routed_blocks(
    depth: int, routed: float, fused: bool, route: Sequence[int], long_skips: bool
) -> range:
    """The blocks of the route, if a setting asks for one; ValueError if there can be none."""
    if not (routed or fused):
        return range(0)
    blocks = range(depth)[slice(*route)]
    if long_skips or not blocks:
        setting = f"routed={routed}" if routed else "fused=true"
        raise ValueError(
            f"{setting} needs route={list(route)} to have some of the {depth} blocks, and no "
            "long_skips; write routed=0 and fused=false, or another route"
        )
    return blocks


class LongSkips(nn.ModuleList):
    """U-ViT's skips: each block of the second half also gets its twin's tokens (arXiv:2209.12152).

    A linear layer joins the two, and at first passes on the block's own tokens.
    """

    def __init__(self, width: int, depth: int):
        super().__init__(nn.Linear(2 * width, width) for _ in range(depth // 2))

    def initialise(self) -> None:
        """Starts with skips that add nothing."""
        for layer in self:
            own, skipped = layer.get_parameter("weight").data.chunk(2, dim=1)
            nn.init.eye_(own)
            nn.init.zeros_(skipped)

    def before(self, index: int, blocks: int) -> nn.Module | None:
        """The layer that joins a skip to the input of block `index` of `blocks`, if one does."""
        first = blocks - len(self)
        return self[index - first] if index >= first else None


class PatchNetwork(nn.Module):
    """Patches through conditioned blocks; DiT and Mamba choose the blocks.

    `positions` is sincos (fixed), sines_first (the same in the order of DiT's code), learned, or
    none. With `overlap` a convolution embeds each patch together with the pixels around it, half a
    patch on each side (as in PVTv2, arXiv:2106.13797); `smooth` adds U-ViT's last layer, a 3x3
    convolution of the output, which is the identity at first (arXiv:2209.12152). `registers` is a
    number of learned tokens that go through the blocks before all others (arXiv:2309.16588).

    With `base_width` W0, networks of all widths W train alike at one learning rate of Adam, that of
    the network which is W0 wide and starts and learns as without it (muP, arXiv:2203.03466): layers
    whose inputs are not as many as W start as those of W0, and `rates` slows the others' down.

    In training, the share `routed` of an image's patches, drawn anew at each call, skips the blocks
    route[0] to before route[1], counted as in a slice (TREAD, arXiv:2501.04765). With `fused`, a
    linear layer joins what leaves these blocks with what entered them, in training and afterwards;
    patches that skipped them are 0 in the first (SPRINT, arXiv:2510.21986, whose code has a small
    fixed vector for 0).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        patch: int,
        width: int,
        positions: str,
        long_skips: bool,
        blocks: Sequence[Block],
        overlap: bool = False,
        smooth: bool = False,
        registers: int = 0,
        base_width: int | None = None,
        routed: float = 0.0,
        route: Sequence[int] = (1, -1),
        fused: bool = False,
    ):
        super().__init__()
        self.rows, columns = patch_grid(image_size, patch)
        self.tokens = self.rows * columns
        if width % 4:
            raise ValueError(f"width={width} must be a multiple of 4")
        if long_skips and len(blocks) == 1:
            raise ValueError(
                "long_skips=true connects pairs of blocks, but depth=1 has none; write a depth of "
                "2 or more, or long_skips=false"
            )
        self.routed = routed
        self.route = routed_blocks(len(blocks), routed, fused, route, long_skips)
        self.fusion = nn.Linear(2 * width, width) if fused else None
        self.condition_width = width
        self.base_width, self.patch = base_width, patch
        self.embed = embedding(in_channels, width, patch, overlap)
        self.noise = NoiseEmbedding(FREQUENCIES, width)
        grid = grid_positions(self.rows, columns, width, sines_first=positions == "sines_first")
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty_like(grid))
        else:
            fixed = None if positions == "none" else grid
            self.register_buffer("positions", fixed, persistent=False)
        self.registers = nn.Parameter(torch.empty(registers, width)) if registers else None
        self.blocks = nn.ModuleList(blocks)
        self.skips = LongSkips(width, len(self.blocks) if long_skips else 0)
        self.shared_modulation = blocks[0].shared_modulation(width)
        self.norm = blocks[0].make_norm(elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, out_channels * patch**2)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1) if smooth else None
        initialise(self)

    def initialise(self) -> None:
        """Starts with small embeddings and an output of 0."""
        for layer in (self.noise[0], self.noise[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        for learned in (self.positions, self.registers):
            if isinstance(learned, nn.Parameter):
                nn.init.normal_(learned, std=0.02)
        for modulation in filter(None, [self.modulation, self.shared_modulation]):
            nn.init.zeros_(modulation[1].get_parameter("weight"))
        nn.init.zeros_(self.out.weight)
        if self.smooth is not None:
            nn.init.dirac_(self.smooth.weight)
        if self.base_width is not None:
            width, embed = self.condition_width, self.embed.get_parameter("weight")
            inputs = embed.shape[1]
            embed.data *= ((inputs + width) / (inputs + self.base_width)) ** 0.5  # Xavier's
            self.noise[2].get_parameter("weight").data *= (self.base_width / width) ** 0.5

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        """The factors of Adam's rate for parameters under muP, W0 / W; others have 1."""
        if self.base_width is None:
            return {}
        grown = [
            layer.get_parameter("weight")
            for layer in self.modules()
            if isinstance(layer, nn.Linear) and layer not in (self.embed, self.noise[0])
        ]
        return dict.fromkeys(grown, self.base_width / self.condition_width)

    @property
    def short(self) -> range:
        """The blocks that see some of the patches alone."""
        return self.route if self.routed else range(0)

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        return self.embed, self.out, *filter(None, [self.smooth])

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        vector, context = condition.after(self.noise(noise))  # (B, D), (B, L, D)
        shared = None if self.shared_modulation is None else self.shared_modulation(vector)
        condition = replace(condition, vector=vector, tokens=context, modulation=shared)
        if isinstance(self.embed, nn.Linear):
            tokens = self.embed(patchify(x, self.patch))  # (B, N, D)
        else:
            tokens = self.embed(x).flatten(2).mT
        if self.positions is not None:
            tokens = tokens + self.positions.to(tokens.dtype)
        patches = tokens.shape[1]
        if self.blocks[0].prepends:
            tokens = torch.cat([context.to(tokens.dtype), tokens], dim=1)  # (B, L + N, D)
        if self.registers is not None:
            registers = self.registers.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([registers, tokens], dim=1)
        earlier: list[Tensor] = []
        route, routing = self.route, self.training and self.routed
        for i, block in enumerate(self.blocks):
            if i in route and i - 1 not in route:
                entered = tokens
                if routing:
                    kept, places = self.kept(tokens, patches)
                    tokens, condition = tokens.gather(1, places), replace(condition, kept=kept)
            if (join := self.skips.before(i, len(self.blocks))) is not None:
                tokens = join(torch.cat([tokens, earlier.pop()], dim=-1))
            tokens = block(tokens, condition)
            if i in route and i + 1 not in route:
                if routing:
                    others = entered if self.fusion is None else torch.zeros_like(entered)
                    tokens = others.scatter(1, places, tokens.to(entered.dtype))
                    condition = replace(condition, kept=None)
                if self.fusion is not None:
                    tokens = self.fusion(torch.cat([tokens, entered], dim=-1))
            if i < len(self.skips):
                earlier.append(tokens)
        tokens = tokens[:, -patches:]
        shift, scale = self.modulation(vector).chunk(2, dim=1)
        output = self.out(modulate(self.norm(tokens), shift, scale))  # (B, N, C_out p^2)
        image = unpatchify(output, self.patch, self.rows)
        return image if self.smooth is None else self.smooth(image)

    def kept(self, tokens: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """The patches of each image that are not routed, (B, K), and the places of what is left.

        These (B, M, D) are indices into the tokens, with all that come before the patches.
        """
        front = tokens.shape[1] - patches
        random = torch.rand(len(tokens), patches, device=tokens.device)
        kept = random.argsort(1)[:, int(patches * self.routed) :].sort(1).values
        first = torch.arange(front, device=tokens.device).expand(len(tokens), -1)
        places = torch.cat([first, kept + front], dim=1)
        return kept, places[..., None].expand(-1, -1, tokens.shape[2])


USUAL_HEAD = 64  # the width of a head at which muP's scale of attention is the usual one


def window_mask(rows: int, columns: int, window: int) -> Tensor:
    """The mask (N, N) that lets patches attend to those at most `window` rows and columns away."""
    places = grid_coordinates(rows, columns)  # (N, 2)
    return (places[:, None] - places[None]).abs().amax(2) <= window


class DiT(PatchNetwork):
    """Patches through `depth` blocks of self-attention.

    `positions` is sincos, sines_first, learned or rotary; `qk_norm` normalises queries and keys;
    `window`, if given, is how many rows and columns away a patch attends; `long_skips` adds U-ViT's
    skips; `overlap`, `smooth`, `registers`, `base_width`, `routed`, `route` and `fused` are
    explained at `PatchNetwork`; with a base width, attention's products are scaled by 8 / d. Raises
    ValueError for sizes that do not divide.
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
        fused: Flag = False,
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
            fused,
        )
