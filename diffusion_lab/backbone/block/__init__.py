from diffusion_lab.backbone.block.adaln_zero import AdaLNZero
from diffusion_lab.backbone.block.base import Block

__all__ = ["AdaLNZero", "Block"]
