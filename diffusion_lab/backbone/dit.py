"""DiT: a transformer over image patches (arXiv:2212.09748).

B batch, N patches, D width, p patch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.attention import SelfAttention
from diffusion_lab.backbone.block import Block
from diffusion_lab.backbone.block.adaln_zero import modulate
from diffusion_lab.backbone.embedding import NoiseEmbedding, grid_positions
from diffusion_lab.conditioning import Condition

FREQUENCIES = 256  # of the noise embedding


def patchify(x: Tensor, patch: int) -> Tensor:
    """Image (B, C, H, W) -> patches (B, N, C p^2), row by row."""
    return F.pixel_unshuffle(x, patch).flatten(2).mT


def unpatchify(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """Patches (B, N, C p^2) in `rows` rows -> image (B, C, H, W)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (rows, -1)), patch)


class DiT(nn.Module):
    """Patches and their fixed positions through `depth` conditioned blocks.

    Raises ValueError if the patches do not tile the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        block: Callable[..., Block],
    ):
        super().__init__()
        height, columns = image_size
        if height % patch or columns % patch:
            raise ValueError(
                f"patches of {patch} do not tile a {height}x{columns} image; "
                f"write a backbone.patch that divides both sides"
            )
        if width % 4:
            raise ValueError(f"backbone.width={width} is not a multiple of 4; write one that is")
        self.condition_width = width
        self.patch = patch
        self.rows = height // patch
        self.embed = nn.Linear(in_channels * patch**2, width)
        self.noise = NoiseEmbedding(FREQUENCIES, width)
        positions = grid_positions(self.rows, columns // patch, width)
        self.register_buffer("positions", positions, persistent=False)
        mixer = partial(SelfAttention, width, heads)
        self.blocks = nn.ModuleList(block(width=width, mixer=mixer) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, out_channels * patch**2)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.noise[0], self.noise[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation[1], self.out):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            block.initialise()

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W)."""
        vector = self.noise(noise)  # (B, D)
        if condition.vector is not None:
            vector = vector + condition.vector
        condition = replace(condition, vector=vector)
        tokens = self.embed(patchify(x, self.patch))  # (B, N, D)
        tokens = tokens + self.positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(vector).chunk(2, dim=1)
        output = self.out(modulate(self.norm(tokens), shift, scale))  # (B, N, C_out p^2)
        return unpatchify(output, self.patch, self.rows)
