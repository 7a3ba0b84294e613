"""Callbacks that do not fit every run, and are refused before there is a run folder."""

from abc import ABC, abstractmethod

from omegaconf import DictConfig

from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.training.module import OBSERVED, TrainedModule


class Checked(ABC):
    """A part of a callback: the check of whether it fits a run."""

    @abstractmethod
    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        """Raises UserError if the callback does not fit; `trainer` holds the trainer's settings."""


def require_diffusion(module: TrainedModule, key: str) -> None:
    """Raises UserError, naming the callback's key, unless the run trains a diffusion model."""
    if OBSERVED not in module.returns:
        raise UserError(f"{key} needs a diffusion model, and this run trains none; leave it out")
