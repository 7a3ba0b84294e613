"""Guidance: what sits between the denoiser and the sampler, x0 = weak + scale (strong - weak)."""

import torch
from torch import Tensor

from diffusion_lab.denoiser import DenoiseFn, Denoiser, Estimate
from diffusion_lab.noise import NoiseLevel


class Guidance:
    """Classifier-free guidance on x0 (arXiv:2207.12598).

    scale 1 is exactly the conditional model and 0 exactly the unconditional one, in one network
    call; any other scale takes both models in one call of twice the batch. `clip`, if given, then
    clamps x0 to [-clip, clip]: 1 for images in [-1, 1] is DDPM's clip_denoised.
    """

    def __init__(self, scale: float = 1.0, clip: float | None = None):
        if clip is not None and clip <= 0:
            raise ValueError(f"guidance.clip={clip} must be above 0, or null for no clipping")
        self.scale = scale
        self.clip = clip

    def bind(self, denoiser: Denoiser, labels: Tensor | None) -> DenoiseFn:
        """The function that a sampler calls, for these labels (B,) int64 or None."""
        if self.scale in (0, 1):
            wanted = labels if self.scale == 1 else None

            def guided(x: Tensor, level: NoiseLevel) -> Tensor:
                return denoiser(x, level, wanted).x0

        elif labels is None or not denoiser.conditioning.conditional:
            raise ValueError(
                f"guidance.scale={self.scale} needs a model trained on labels; "
                "use guidance=none with an unconditional one"
            )
        else:
            both = torch.cat([labels, torch.full_like(labels, denoiser.conditioning.null_label)])

            def guided(x: Tensor, level: NoiseLevel) -> Tensor:
                strong, weak = denoiser(torch.cat([x, x]), level, both).x0.chunk(2)
                return weak + self.scale * (strong - weak)

        def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
            x0 = guided(x, level)
            return Estimate(x0 if self.clip is None else x0.clamp(-self.clip, self.clip))

        return denoise
