"""Training objectives: what the network predicts, at which noise levels, with which weight."""

from .loss import Objective
from .prediction import EDM, X0, Eps, Flow, Prediction, Score, V
from .time_sampler import (
    CosineInterpolated,
    LogitNormal,
    LogNormal,
    SecondMoment,
    TimeSampler,
    Uniform,
)
from .uncertainty import LearnedUncertainty
from .variance_loss import Hybrid
from .weighting import P2, SNR, EDMWeight, MinSNR, Sigmoid, SoftMinSNR, TruncatedSNR, Weighting

__all__ = [
    "EDM",
    "P2",
    "SNR",
    "X0",
    "CosineInterpolated",
    "EDMWeight",
    "Eps",
    "Flow",
    "Hybrid",
    "LearnedUncertainty",
    "LogNormal",
    "LogitNormal",
    "MinSNR",
    "Objective",
    "Prediction",
    "Score",
    "SecondMoment",
    "Sigmoid",
    "SoftMinSNR",
    "TimeSampler",
    "TruncatedSNR",
    "Uniform",
    "V",
    "Weighting",
]
