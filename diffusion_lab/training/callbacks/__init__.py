from diffusion_lab.training.callbacks.checkpoint import Checkpoint
from diffusion_lab.training.callbacks.evaluation import Evaluation
from diffusion_lab.training.callbacks.interruption import Interruption
from diffusion_lab.training.callbacks.non_finite import NonFinite
from diffusion_lab.training.callbacks.pruning import MedianPruning
from diffusion_lab.training.callbacks.reconstruction import (
    ReconstructionEvaluation,
    ReconstructionGrid,
)
from diffusion_lab.training.callbacks.sample_grid import SampleGrid
from diffusion_lab.training.callbacks.throughput import Throughput
from diffusion_lab.training.callbacks.weight_averaging import EMA

__all__ = [
    "EMA",
    "Checkpoint",
    "Evaluation",
    "Interruption",
    "MedianPruning",
    "NonFinite",
    "ReconstructionEvaluation",
    "ReconstructionGrid",
    "SampleGrid",
    "Throughput",
]
