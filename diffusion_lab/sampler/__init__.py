"""Samplers: from noise to data, one denoised estimate at a time."""

from .ancestral import Ancestral
from .base import Sampler
from .euler import Euler
from .heun import Heun
from .multistep import IPNDM, DPMSolver, UniPC
from .runge_kutta import AdaptiveRungeKutta
from .stochastic import AnnealedLangevin, PredictorCorrector, ReverseSDE

__all__ = [
    "IPNDM",
    "AdaptiveRungeKutta",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "Euler",
    "Heun",
    "PredictorCorrector",
    "ReverseSDE",
    "Sampler",
    "UniPC",
]
