"""What a run is made of, whatever it trains."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn

from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.training.callbacks import EMA, Checkpoint, Evaluation
from diffusion_lab.training.module import TrainedModule


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Everything that a run trains and measures with, built and checked, nothing written."""

    command: ClassVar[str]  # that trains it

    datamodule: ImageDataModule
    module: TrainedModule
    callbacks: list[Callback]
    metrics: GenerativeMetrics | None
    pipeline: Pipeline | None = None  # None: what is trained makes no samples

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The module whose parameters are counted."""

    @abstractmethod
    def compile(self) -> None:
        """Compiles what training spends its time in, in place: checkpoints keep their keys."""

    def prepare(self, device: torch.device) -> dict[str, object]:
        """Looks at the data before a run is made; returns what its configuration is to record."""
        return {}

    def save_dependencies(self, folder: Path) -> None:
        """Leaves in a new run what it is opened with; on rank 0."""
        return None

    def advice(self) -> list[str]:
        """Sentences on what can be trained but may disappoint."""
        return []

    def with_ceiling(self, results: dict[str, float]) -> dict[str, float]:
        """The metrics of an evaluation, and those of the best that could be expected."""
        return results

    def macs(self, cfg: DictConfig) -> int | None:
        """Multiply-accumulates of a call of the network on one image, where they are counted."""
        return None

    def finish(self, folder: Path, results: dict[str, float], device: torch.device) -> None:
        """Writes what a finished run leaves besides its summary; on rank 0."""
        return None


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """The configured callbacks, in the order in which their hooks must run."""
    callbacks = []
    for key in (f"callbacks.{name}" for name, settings in cfg.callbacks.items() if settings):
        callbacks.append(instantiate(cfg, key))
        if not isinstance(callbacks[-1], Callback):
            raise UserError(f"{key}._target_ must be a callback of Lightning's, and is none")
    # a checkpoint, grid or figure of a step must have the average of that step
    callbacks.sort(key=lambda callback: not isinstance(callback, EMA))
    # and what a step leaves must be there before a checkpoint says that it was made
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoint))
    return callbacks


def build_metrics(
    cfg: DictConfig, callbacks: list[Callback], conditional: bool, num_classes: int
) -> GenerativeMetrics | None:
    """The metrics of a run, None unless one of its callbacks evaluates."""
    if not any(isinstance(callback, Evaluation) for callback in callbacks):
        return None
    metrics = instantiate(cfg, "metrics")
    with errors_at(cfg, "metrics"):
        metrics.check(conditional, num_classes)
    return metrics
