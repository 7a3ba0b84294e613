"""What a run is made of, whatever it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from omegaconf import DictConfig
from torch import nn

from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.training.logger import WandB
from diffusion_lab.training.module import TrainedModule
from diffusion_lab.training.trainer import build_trainer, quiet_lightning


@dataclass(frozen=True)
class Task(ABC):
    """Everything that a run trains and measures with, built and checked, nothing written."""

    command: ClassVar[str]  # that trains it

    datamodule: ImageDataModule
    module: TrainedModule
    metrics: GenerativeMetrics | None
    callbacks: dict  # instances, or factories that want the facts of a run folder
    logger: Callable[..., WandB] | None  # a factory that wants them too
    prepared: PreparedMetrics | None = field(default=None, kw_only=True)  # once the data are read

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """Whose parameters are counted."""

    @abstractmethod
    def compile(self) -> None:
        """Compiles what training spends its time in, in place: checkpoints keep their keys."""

    def prepare(self, cfg: DictConfig, device: torch.device) -> None:
        """Looks at the data before a run is made, and keeps in `cfg` what it is to remember."""
        return None

    def save_dependencies(self, folder: Path) -> None:
        """Leaves in a new run what it is reopened with; on rank 0."""
        return None

    def advice(self) -> list[str]:
        """Sentences on what can be trained but may disappoint."""
        return []

    @abstractmethod
    def facts(self, folder: Path) -> dict[str, dict]:
        """What callbacks, by name, want to know of the run in `folder`."""

    def with_ceiling(self, results: dict[str, float]) -> dict[str, float]:
        """The figures of an evaluation, and those that belong beside them."""
        return results

    def macs(self, cfg: DictConfig) -> int | None:
        """Multiply-accumulates of a call of the network on one image, where they are counted."""
        return None

    def finish(self, folder: Path, results: dict[str, float], device: torch.device) -> None:
        """Writes what a finished run leaves besides its summary; on rank 0."""
        return None


def try_out(cfg: DictConfig, layout: BatchLayout, module: TrainedModule) -> None:
    """Builds optimiser and trainer once, to hear before anything is done what they have to say."""
    module.optimizer(module.trained_parameters())
    if not launch.in_launched_process():
        with quiet_lightning():
            build_trainer(
                cfg, layout, torch.device("cpu"), accelerator="cpu", devices=1, num_nodes=1
            )


def watchers(cfg: DictConfig) -> tuple[dict, Callable[..., WandB] | None]:
    """The configured callbacks and logger, or factories of them."""
    callbacks = {
        name: instantiate(cfg, f"callbacks.{name}") for name, part in cfg.callbacks.items() if part
    }
    return callbacks, instantiate(cfg, "logger")
