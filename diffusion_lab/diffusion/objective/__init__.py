"""Training objectives: what the network predicts, at which noise levels, with which weight."""

from diffusion_lab.diffusion.objective.loss import Denoising, Loss, Losses
from diffusion_lab.diffusion.objective.objective import Coupling, Objective
from diffusion_lab.diffusion.objective.prediction import EDM, X0, Eps, Flow, Prediction, Score, V
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
