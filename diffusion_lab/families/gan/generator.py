"""A generator of the U-Net's blocks: unit noise to an image in one call.

B batch, Z numbers of noise, E width of the embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.base import initialise
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import Upsample
from diffusion_lab.backbone.stage import PixelResidual
from diffusion_lab.backbone.unet import check_levels
from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.common.ranges import MULTIPLE_OF_4, Count, ranges, whole_list
from diffusion_lab.pipeline import LabelledGenerator


class ConvGenerator(nn.Module):
    """The decoder of a U-Net, from noise instead of skips.

    `multipliers` times `channels` is the width of each level, finest first, which has `blocks`
    residual blocks; noise and label modulate each of them. Raises ValueError for an image that is
    too small for the levels.
    """

    @ranges()
    def __init__(
        self,
        image_shape: tuple[int, int, int],
        labels: Labels,
        conditioning: Callable[..., nn.Module],
        channels: Annotated[int, MULTIPLE_OF_4],
        multipliers: Annotated[Sequence[int], whole_list(1, shortest=1)],
        blocks: Count,
        latent_size: Count,
    ):
        super().__init__()
        image_channels, *sides = image_shape
        check_levels((sides[0], sides[1]), len(multipliers), ())
        self.latent_size = latent_size
        embedding = 4 * channels
        self.embed = nn.Sequential(
            nn.Linear(latent_size, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        width = channels * multipliers[-1]
        factor = 2 ** (len(multipliers) - 1)
        self.coarsest = (width, sides[0] // factor, sides[1] // factor)
        self.start = nn.Linear(embedding, width * self.coarsest[1] * self.coarsest[2])
        self.blocks = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks):
                wider = channels * multipliers[level]
                self.blocks.append(PixelResidual(width, wider, embedding, 0.0, scale_shift=True))
                width = wider
            if level:
                self.blocks.append(Upsample(width))
        self.norm = GroupNorm(width, silu=True)
        self.out = nn.Conv2d(width, image_channels, 3, padding=1)
        initialise(self)
        # after the others, as it initialises itself
        self.conditioning: Any = conditioning(labels=labels, width=embedding)

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that are called one after another."""
        return [*self.blocks]

    def forward(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Unit noise (B, Z), and labels (B,) -> images (B, C, H, W) float32, about in [-1, 1]."""
        vector = self.embed(noise)
        own = self.conditioning(labels, len(noise)).vector
        embedding = F.silu(vector if own is None else vector + own)
        x = self.start(embedding).unflatten(1, self.coarsest)
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, embedding) if isinstance(block, PixelResidual) else block(x)
        return self.out(self.norm(x)).float()


@dataclass(frozen=True)
class GANPipeline(LabelledGenerator):
    """A generator; sample i is fixed by `seed` and i alone, up to the network's rounding."""

    model: ConvGenerator
    kind: Labels

    @property
    def conditioning(self) -> Any:
        return self.model.conditioning

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        device = next(self.model.parameters()).device
        noise = SampleNoise(seed, ids, device)((self.model.latent_size,))
        images = self.model(noise, None if labels is None else labels.to(device))
        on_step()
        return to_uint8(require_finite(images))
