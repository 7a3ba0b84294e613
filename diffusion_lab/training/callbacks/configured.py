"""Callbacks of a configuration by their class, whatever keys they have there."""

from hydra.utils import get_class
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig


def configured(cfg: DictConfig, kind: type[Callback]) -> DictConfig | None:
    """The settings of the first callback of a class, or None if a run has no such callback."""
    return next((each for each in cfg.callbacks.values() if each and _is(each, kind)), None)


def _is(settings: DictConfig, kind: type[Callback]) -> bool:
    try:
        return issubclass(get_class(settings._target_), kind)
    except Exception:  # a saved run may name what is not installed here
        return False
