"""Images from a VAE's prior: z ~ N(0, 1), decoded (arXiv:1312.6114)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.common.images import to_uint8
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.first_stage.autoencoder import Autoencoder


@dataclass(frozen=True)
class Prior:
    """Draws images as a `Pipeline` does, in one step and without labels."""

    autoencoder: Autoencoder
    device: torch.device
    conditional = False
    steps = 1

    def labels(self, ids: Sequence[int]) -> None:
        """None, as a prior has no labels."""
        return None

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[int],
        seed: int = 0,
        labels: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); sample i is fixed by `seed` and i alone."""
        latents = SampleNoise(seed, ids, self.device)(self.autoencoder.latent_shape)
        images = to_uint8(self.autoencoder.decode(latents))
        on_step()
        return images
