"""Draws a GAN's images, from seeds and labels to uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.families.gan.generator import ConvGenerator
from diffusion_lab.pipeline import LabelledGenerator


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
