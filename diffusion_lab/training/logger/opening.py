"""Checks and builds the loggers that a configuration names."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.instantiate import Factory, check_keys, errors_at, instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.run_logger import RunLogger


def check_loggers(cfg: DictConfig) -> None:
    """Raises UserError for a logger that cannot work, before there is a run folder."""
    for key in keys_of(cfg):
        factory = instantiate(cfg, key)
        kind: Any = factory.target.func if isinstance(factory, Factory) else None
        if not (isinstance(kind, type) and issubclass(kind, RunLogger)):
            raise UserError(
                f"{key}._target_ must be a logger of this program, with _partial_; choose them by "
                "name, as in logger=[wandb,tensorboard]"
            )
        given = kind.allowed.keys() & factory.settings.keys()  # earlier runs lack newer settings
        check_keys(cfg, {f"{key}.{name}": kind.allowed[name] for name in given})
        with errors_at(cfg, key):
            kind.require()


def build_loggers(
    cfg: DictConfig, folder: Path, clock: Clock, resumed_from: int
) -> list[RunLogger]:
    """Builds the loggers of a run that has trained for `resumed_from` steps; none is started."""
    config = OmegaConf.to_container(cfg, resolve=True)
    facts = {"run_dir": folder, "clock": clock, "config": config, "resumed_from": resumed_from}
    return [instantiate(cfg, key)(**facts) for key in keys_of(cfg)]


def keys_of(cfg: DictConfig) -> list[str]:
    """The keys of the loggers in a configuration; none if their list is empty."""
    return [f"logger.{name}" for name in cfg.get("logger") or {}]
