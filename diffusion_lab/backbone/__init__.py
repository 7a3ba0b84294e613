from diffusion_lab.backbone.base import Backbone
from diffusion_lab.backbone.diffusers_networks import DiffusersDiT, DiffusersUNet
from diffusion_lab.backbone.dit import DiT
from diffusion_lab.backbone.mamba import Mamba, Mamba2
from diffusion_lab.backbone.mlp import MLP
from diffusion_lab.backbone.unet import UNet
