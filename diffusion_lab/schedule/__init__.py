"""Noise schedules: t -> (alpha, sigma) in x_t = alpha x0 + sigma eps."""

from .base import NoiseSchedule
from .continuous import Cosine, Rectified, VarianceExploding
from .discrete import DDPMLinear

__all__ = ["Cosine", "DDPMLinear", "NoiseSchedule", "Rectified", "VarianceExploding"]
