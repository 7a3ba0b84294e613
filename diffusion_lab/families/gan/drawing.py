"""Draws a GAN's images, from seeds and labels to uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.common.images import to_uint8
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.families.gan.generator import ConvGenerator
from diffusion_lab.pipeline import LabelledGenerator


@dataclass(frozen=True)
class GANPipeline(LabelledGenerator):
    """A generator; sample i is fixed by `seed` and i alone, up to the network's rounding."""

    model: ConvGenerator
    num_classes: int

    @property
    def conditioning(self) -> Any:
        return self.model.conditioning

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[int],
        seed: int = 0,
        labels: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); `labels` (B,) replaces the cycling classes."""
        device = next(self.model.parameters()).device
        labels = self.labels(ids) if labels is None else labels
        noise = SampleNoise(seed, ids, device)((self.model.latent_size,))
        images = to_uint8(self.model(noise, None if labels is None else labels.to(device)))
        on_step()
        return images
