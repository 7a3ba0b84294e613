"""Samplers: from noise to data, one denoised estimate at a time."""

from .ancestral import Ancestral
from .base import Sampler
from .euler import Euler
from .heun import Heun
from .multistep import DPMSolver

__all__ = ["Ancestral", "DPMSolver", "Euler", "Heun", "Sampler"]
