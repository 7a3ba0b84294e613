"""Inpainting: the estimate of x0 is replaced where the image is known."""

import torch
from torch import Tensor

from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel


def keep_known(denoise: DenoiseFn, known: Tensor, mask: Tensor) -> DenoiseFn:
    """Inpainting by replacement at sampling time (arXiv:2011.13456, section I.2).

    Where `mask`, broadcast to x, is true, the estimate is the clean image `known` (B, ...): a
    sampler then carries alpha known + sigma eps there, with its own noise, and ends on `known`. The
    paper replaces the state x with fresh noise instead; neither is an exact conditional.
    """

    def inpainted(x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x, level)
        kept = estimate.noise_x0
        return estimate._replace(
            x0=torch.where(mask, known, estimate.x0),
            noise_x0=None if kept is None else torch.where(mask, known, kept),
        )

    return inpainted
