"""Callbacks: what training does besides its steps, such as averages, checkpoints and grids."""

from diffusion_lab.training.callbacks.checkpoint import Checkpoint
from diffusion_lab.training.callbacks.denoising import DenoisingGrid
from diffusion_lab.training.callbacks.evaluation import (
    Evaluation,
    Grid,
    ReconstructionEvaluation,
    ReconstructionGrid,
    SampleEvaluation,
    SampleGrid,
)
from diffusion_lab.training.callbacks.interruption import Interruption
from diffusion_lab.training.callbacks.level_losses import LevelLosses
from diffusion_lab.training.callbacks.non_finite import NonFinite
from diffusion_lab.training.callbacks.one_batch import OneBatch
from diffusion_lab.training.callbacks.periodic import Checked, Periodic
from diffusion_lab.training.callbacks.settings import configured, sampling_seed
from diffusion_lab.training.callbacks.statistics import Statistics
from diffusion_lab.training.callbacks.stopping import Collapse, MedianPruning
from diffusion_lab.training.callbacks.throughput import OperatorProfile, Throughput
from diffusion_lab.training.callbacks.weight_averaging import EMA, PosthocEMA
