"""Networks: noisy images, noise levels and labels -> outputs of the shape of the images."""

from diffusion_lab.backbone.base import Backbone
from diffusion_lab.backbone.block import (
    AdaLN,
    AdaLNSingle,
    AdaLNZero,
    Block,
    CrossAttentionBlock,
    InContext,
)
from diffusion_lab.backbone.conditioning import (
    Attributes,
    ClassLabel,
    Condition,
    NumericLabel,
    RawLabels,
    Unconditional,
)
from diffusion_lab.backbone.diffusers_networks import DiffusersDiT, DiffusersModel, DiffusersUNet
from diffusion_lab.backbone.edm2 import EDM2UNet
from diffusion_lab.backbone.energy import Energy
from diffusion_lab.backbone.mamba import Mamba, Mamba2
from diffusion_lab.backbone.mlp import MLP
from diffusion_lab.backbone.patches import DiT
from diffusion_lab.backbone.resample import (
    BlockResampling,
    ConvResampling,
    FilterResampling,
    Resampling,
)
from diffusion_lab.backbone.stage import Stage
from diffusion_lab.backbone.unet import UNet
