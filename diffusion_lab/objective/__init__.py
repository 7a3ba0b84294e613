"""Training objectives: what the network predicts, at which noise levels, with which weight."""

from .loss import Objective
from .prediction import EDM, X0, Eps, Flow, Prediction, V
from .time_sampler import LogitNormal, LogNormal, TimeSampler, Uniform
from .weighting import MinSNR, Weighting

__all__ = [
    "EDM",
    "X0",
    "Eps",
    "Flow",
    "LogNormal",
    "LogitNormal",
    "MinSNR",
    "Objective",
    "Prediction",
    "TimeSampler",
    "Uniform",
    "V",
    "Weighting",
]
