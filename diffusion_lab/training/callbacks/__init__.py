"""Callbacks: what training does besides its steps, such as averages, checkpoints and grids."""

from diffusion_lab.training.callbacks.checked import Checked
from diffusion_lab.training.callbacks.checkpoint import Checkpoint
from diffusion_lab.training.callbacks.collapse import Collapse
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
from diffusion_lab.training.callbacks.operator_profile import OperatorProfile
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.posthoc_ema import PosthocEMA
from diffusion_lab.training.callbacks.pruning import MedianPruning
from diffusion_lab.training.callbacks.settings import configured, sampling_seed
from diffusion_lab.training.callbacks.statistics import Statistics
from diffusion_lab.training.callbacks.throughput import Throughput
from diffusion_lab.training.callbacks.weight_averaging import EMA
