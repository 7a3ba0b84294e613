"""Noise schedules: t -> (alpha, sigma) in x_t = alpha x0 + sigma eps."""

from .base import NoiseSchedule
from .continuous import Cosine, Linear, Rectified, Sigmoid, SubVP, VarianceExploding
from .discrete import DDPMCosine, DDPMLinear, DDPMScaledLinear
from .transforms import Shifted, ZeroTerminalSNR

__all__ = [
    "Cosine",
    "DDPMCosine",
    "DDPMLinear",
    "DDPMScaledLinear",
    "Linear",
    "NoiseSchedule",
    "Rectified",
    "Shifted",
    "Sigmoid",
    "SubVP",
    "VarianceExploding",
    "ZeroTerminalSNR",
]
