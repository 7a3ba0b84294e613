"""Finds the settings of a callback in a configuration by class, whatever its key."""

from contextlib import suppress

from hydra.utils import get_class
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.training.callbacks.evaluation import SampleEvaluation


def sampling_seed(cfg: DictConfig) -> int:
    """The seed of the samples by which a run was measured; 0 if none were."""
    evaluation = configured(cfg, SampleEvaluation)
    return evaluation.get("seed", 0) if evaluation else 0


def configured(cfg: DictConfig, kind: type[Callback]) -> DictConfig | None:
    """The settings of the first callback of a class, or None if a run has no such callback."""
    for settings in filter(None, cfg.callbacks.values()):
        with suppress(Exception):  # a saved run may name a class that is not installed here
            if issubclass(get_class(settings._target_), kind):
                return settings
    return None
