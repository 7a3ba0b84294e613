"""Guidance, between the denoiser and the sampler."""

from diffusion_lab.diffusion.guidance.base import Guidance, LabelLikelihood
from diffusion_lab.diffusion.guidance.variants import (
    ClassifierGuidance,
    EmbeddedGuidance,
    PlusPlusGuidance,
    ProjectedGuidance,
    ZeroStarGuidance,
    keep_known,
)
