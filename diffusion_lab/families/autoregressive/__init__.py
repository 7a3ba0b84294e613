"""Images as sequences of codes, each predicted from those before it."""

from diffusion_lab.families.autoregressive.model import (
    CodePipeline,
    CodeSampler,
    CodeTransformer,
    LogitGuidance,
    NextCode,
)
