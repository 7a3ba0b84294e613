"""Callbacks: what training does besides its steps, such as averages, checkpoints and grids."""

from diffusion_lab.training.callbacks.checkpoint import Checkpoint
from diffusion_lab.training.callbacks.evaluation import (
    DenoisingGrid,
    Evaluation,
    Grid,
    ReconstructionEvaluation,
    ReconstructionGrid,
    SampleEvaluation,
    SampleGrid,
    configured,
    sampling_seed,
)
from diffusion_lab.training.callbacks.non_finite import NonFinite
from diffusion_lab.training.callbacks.periodic import Checked, OneBatch, Periodic
from diffusion_lab.training.callbacks.statistics import Statistics
from diffusion_lab.training.callbacks.stopping import Collapse, Interruption, MedianPruning
from diffusion_lab.training.callbacks.throughput import LevelLosses, OperatorProfile, Throughput
from diffusion_lab.training.callbacks.weight_averaging import EMA, PosthocEMA
