"""Images as sequences of codes, each predicted from those before it."""

from diffusion_lab.families.autoregressive.drawing import CodePipeline, CodeSampler, LogitGuidance
from diffusion_lab.families.autoregressive.next_code import NextCode
from diffusion_lab.families.autoregressive.transformer import CodeTransformer
