"""Noise schedules: t -> (alpha, sigma) in x_t = alpha x0 + sigma eps."""

from diffusion_lab.diffusion.schedule.base import NoiseSchedule
from diffusion_lab.diffusion.schedule.continuous import (
    Cosine,
    Linear,
    Rectified,
    Sigmoid,
    SubVP,
    VarianceExploding,
)
from diffusion_lab.diffusion.schedule.discrete import DDPMCosine, DDPMLinear, DDPMScaledLinear
from diffusion_lab.diffusion.schedule.transforms import Shifted, ZeroTerminalSNR
