from diffusion_lab.callbacks.checkpoint import Checkpoint
from diffusion_lab.callbacks.evaluation import Evaluation
from diffusion_lab.callbacks.interruption import Interruption
from diffusion_lab.callbacks.non_finite import NonFinite
from diffusion_lab.callbacks.pruning import MedianPruning
from diffusion_lab.callbacks.reconstruction import ReconstructionEvaluation, ReconstructionGrid
from diffusion_lab.callbacks.sample_grid import SampleGrid
from diffusion_lab.callbacks.throughput import Throughput
from diffusion_lab.callbacks.weight_averaging import EMA

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
