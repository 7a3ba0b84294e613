from diffusion_lab.backbone.block.adaln import AdaLN, AdaLNZero
from diffusion_lab.backbone.block.base import Block
from diffusion_lab.backbone.block.cross_attention import CrossAttentionBlock
from diffusion_lab.backbone.block.in_context import InContext
