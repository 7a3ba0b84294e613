"""Training objectives: what the network predicts, at which noise levels, with which weight."""

from diffusion_lab.diffusion.objective.objective import Coupling, Objective
from diffusion_lab.diffusion.objective.prediction import EDM, X0, Eps, Flow, Prediction, Score, V
from diffusion_lab.diffusion.objective.score_loss import (
    ExactScoreMatching,
    ScoreLoss,
    SlicedScoreMatching,
)
from diffusion_lab.diffusion.objective.teacher import TeacherModel, TeacherPairs
from diffusion_lab.diffusion.objective.time_sampler import (
    BatchShare,
    CosineInterpolated,
    LogitNormal,
    LogNormal,
    SecondMoment,
    TimeSampler,
    UniformTime,
)
from diffusion_lab.diffusion.objective.uncertainty import LearnedUncertainty
from diffusion_lab.diffusion.objective.variance_loss import Hybrid
from diffusion_lab.diffusion.objective.weighting import (
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
