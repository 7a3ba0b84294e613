from diffusion_lab.backbone.base import Backbone
from diffusion_lab.backbone.dit import DiT
from diffusion_lab.backbone.mlp import MLP
from diffusion_lab.backbone.unet import UNet

__all__ = ["MLP", "Backbone", "DiT", "UNet"]
