"""The base class of trained runs that are open, to be sampled from and measured."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import read_data
from diffusion_lab.common.errors import UserError
from diffusion_lab.compute.device import autocast, pick_device, pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.runs.vae_prior import Prior
from diffusion_lab.runs.weights import identify, require_unchanged


@dataclass(frozen=True)
class OpenRun(ABC):
    """A trained run on a device; each subclass is a kind of run."""

    command: ClassVar[str]  # trains runs of this kind
    summary_is_of_samples: ClassVar[bool]  # or of reconstructed test images
    groups_without_choice: ClassVar[tuple[str, ...]] = ()  # of those that commands on runs have

    saved: DictConfig  # the run's configuration
    datamodule: ImageDataModule  # unread
    device: torch.device
    precision: str
    weights: dict[str, object]  # identifies them

    @classmethod
    def open(cls, cfg: DictConfig, saved: DictConfig) -> Self:
        """Opens the run `cfg.run`, whose configuration is `saved`, on the device of `cfg`.

        `cfg.data_root` is the folder of its data, if they were moved. Raises UserError for anything
        that is missing, damaged or impossible on this machine.
        """
        if cfg.data_root:
            move_data(saved.data.source, cfg.data_root)
        device = pick_device(cfg.device)
        precision = pick_precision(cfg.precision, device)
        autocast(precision, device)  # refuses a precision that the device does not have
        weights = identify(cfg.run)
        opened = cls.load(Path(cfg.run), saved, device, precision, weights)
        require_unchanged(cfg.run, weights)
        return opened

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: Path,
        saved: DictConfig,
        device: torch.device,
        precision: str,
        weights: dict[str, object],
    ) -> Self:
        """Reads the run's networks and moves them to the device; raises UserError."""

    @classmethod
    @abstractmethod
    def weights_to_export(
        cls, folder: Path, saved: DictConfig, kind: str
    ) -> tuple[dict[str, Tensor], int]:
        """The weights of `kind` to give away, and their step; raises UserError without any."""

    @classmethod
    def is_complete(cls, folder: Path) -> bool:
        """Whether a finished run has all files that resuming it would write."""
        return True

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether samples are of classes."""

    @property
    @abstractmethod
    def reconstruction_metrics(self) -> dict[str, float]:
        """Metrics of test images that the first stage reconstructs; the data must be read."""

    @abstractmethod
    def pipeline(self, cfg: DictConfig) -> Pipeline | Prior:
        """The sampling call with the sampler and guidance of `cfg`; raises UserError."""

    @property
    def autocast(self) -> torch.autocast:
        """The context in which the networks are called."""
        return autocast(self.precision, self.device)

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        """The metrics of `cfg.metrics`, loaded but not prepared; reads the data."""
        metrics = instantiate(cfg, "metrics")
        with errors_at(cfg, "metrics"):
            metrics.check(self.conditional, self.datamodule.num_classes)
        read_data(self.saved, self.datamodule)
        with errors_at(cfg, "metrics"):
            metrics.load(self.datamodule, self.device)
        return metrics


def move_data(source: DictConfig, folder: str) -> None:
    """Sets the root of a data source to `folder`, or looks there for its path and test_path."""
    if "root" in source:
        source.root = folder
        return
    paths = [key for key in ("path", "test_path") if source.get(key)]
    if not paths:
        raise UserError(f"data_root={folder}, but this run's data are in no files; leave it out")
    for key in paths:
        source[key] = str(Path(folder) / Path(source[key]).name)
