"""Training losses, each one object with all of its settings."""

from diffusion_lab.diffusion.objective.loss.base import (
    Contrastive,
    Denoising,
    Loss,
    Losses,
    Parts,
    Recorded,
)
from diffusion_lab.diffusion.objective.loss.consistency import Consistency, Distillation, Shortcut
from diffusion_lab.diffusion.objective.loss.continuous import ContinuousConsistency
from diffusion_lab.diffusion.objective.loss.lagrangian import Lagrangian
from diffusion_lab.diffusion.objective.loss.mean_flow import AlphaFlow, ImprovedMeanFlow, MeanFlow
from diffusion_lab.diffusion.objective.loss.score_matching import (
    ExactScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)
from diffusion_lab.diffusion.objective.loss.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.loss.variance import Hybrid
from diffusion_lab.diffusion.objective.loss.weighting import (
    P2,
    SNR,
    EDMWeight,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    VelocityWeight,
    Weighting,
)
