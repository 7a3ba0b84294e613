"""A residual MLP on flattened images: for points and toy problems, and as the simplest baseline."""

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.base import Size, height_and_width
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import NoiseEmbedding
from diffusion_lab.common.ranges import ranges, whole

FREQUENCIES = 64  # numbers in the sinusoid of the noise embedding


class ResidualLayer(nn.Module):
    """h + W2 silu(W1 norm(h) + condition)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.condition = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        """h and vector (B, width) -> (B, width)."""
        return h + self.outer(F.silu(self.inner(self.norm(h)) + self.condition(vector)))


class MLP(nn.Module):
    """`depth` residual blocks of `width` on all numbers of an image at once."""

    @ranges(width=whole(1), depth=whole(1))
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        width: int = 128,
        depth: int = 4,
    ):
        super().__init__()
        height, columns = height_and_width(image_size)
        self.condition_width = width
        self.out_shape = (out_channels, height, columns)
        self.embed = nn.Linear(in_channels * height * columns, width)
        self.noise = NoiseEmbedding(FREQUENCIES, width)
        blocks = [ResidualLayer(width) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels * height * columns)
        for layer in (self.out, *(block.outer for block in blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return self.embed, self.out

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        vector, _ = condition.after(self.noise(noise))  # (B, width)
        h = self.embed(x.flatten(1))  # (B, width)
        for block in self.blocks:
            h = block(h, F.silu(vector))
        return self.out(self.norm(h)).unflatten(1, self.out_shape)
