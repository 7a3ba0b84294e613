"""Samplers: from noise to data, one denoised estimate at a time."""

from diffusion_lab.diffusion.sampler.base import Sampler
from diffusion_lab.diffusion.sampler.multistep import DEIS, IPNDM, DPMSolver, UniPC
from diffusion_lab.diffusion.sampler.runge_kutta import AdaptiveRungeKutta
from diffusion_lab.diffusion.sampler.single_step import (
    Ancestral,
    AncestralDPMSolver,
    Euler,
    FewStep,
    FlowMap,
    Heun,
    Restart,
)
from diffusion_lab.diffusion.sampler.stochastic import (
    AnnealedLangevin,
    PredictorCorrector,
    ReverseSDE,
)
from diffusion_lab.diffusion.sampler.time_grid import (
    Explicit,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    TimeGrid,
    Trailing,
    UniformGrid,
    UniformLogSNR,
)
