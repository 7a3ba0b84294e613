from diffusion_lab.backbone.base import Backbone
from diffusion_lab.backbone.dit import DiT
from diffusion_lab.backbone.unet import UNet

__all__ = ["Backbone", "DiT", "UNet"]
