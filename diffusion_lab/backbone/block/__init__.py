from diffusion_lab.backbone.block.adaln import AdaLN, AdaLNZero
from diffusion_lab.backbone.block.base import Block
from diffusion_lab.backbone.block.cross_attention import CrossAttention
from diffusion_lab.backbone.block.in_context import InContext

__all__ = ["AdaLN", "AdaLNZero", "Block", "CrossAttention", "InContext"]
