"""The base class of trained runs that are opened, to sample from them and measure them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.build.config_keys import verbatim
from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import read_data
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute.device import autocast, device_and_precision
from diffusion_lab.compute.distributed import gather_shards, rank_and_world, shard
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.quantity import Protocol
from diffusion_lab.pipeline import Generator, draw
from diffusion_lab.runs import kept_checkpoints
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.current import EXPORTED, identify, require_unchanged
from diffusion_lab.runs.results import save_evaluation
from diffusion_lab.runs.weights import WeightsChoice


@dataclass(frozen=True)
class OpenRun(ABC):
    """A trained run on a device; each subclass is a kind of run."""

    command: ClassVar[str] = "train"  # the name of the command that trains runs of this kind
    results: ClassVar[tuple[str, ...]] = ()  # files of a finished run, besides the summary
    groups_without_choice: ClassVar[tuple[str, ...]] = ()  # groups that this kind does not have
    limits: ClassVar[str] = ""  # what else than a diffusion model it is, and who accepts it

    saved: DictConfig  # the run's configuration
    device: torch.device
    precision: str
    weights: dict[str, object]  # checksum and file stamp of the weights
    datamodule: ImageDataModule  # its images are not read yet

    @classmethod
    def open(cls, cfg: DictConfig, saved: DictConfig) -> Self:
        """Opens the run `cfg.run`, whose configuration is `saved`, on the device of `cfg`.

        `cfg.average` names the average of the weights; None is the one that the run evaluates.
        `cfg.step` is the step of a kept checkpoint, and is set to null if it is the newest one's.
        `cfg.data_root` is the new folder of the run's data, if they were moved. Raises
        UserError for anything that is missing, damaged or impossible on this machine.
        """
        if cfg.data_root:
            move_data(saved.data.source, cfg.data_root)
        device, precision = device_and_precision(cfg.device, cfg.precision)
        choice = weights_choice(cfg)
        weights = identify(cfg.run, choice.checkpoint)
        fields = cls.load(choice, saved, device)
        require_unchanged(cfg.run, weights, choice.checkpoint)
        return cls(saved, device, precision, weights, **fields)

    @classmethod
    @abstractmethod
    def load(cls, choice: WeightsChoice, saved: DictConfig, device: torch.device) -> dict[str, Any]:
        """Returns `datamodule` and the subclass's fields, networks on `device`; may raise."""

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether the model draws samples of given classes."""

    @property
    @abstractmethod
    def reconstruction_metrics(self) -> dict[str, float]:
        """The metrics of test images reconstructed by the first stage; the data must be read."""

    @abstractmethod
    def pipeline(self, cfg: DictConfig) -> Generator:
        """Builds the sampling call with the sampler and guidance of `cfg`; may raise UserError."""

    def draw_all(
        self,
        pipeline: Generator,
        cfg: DictConfig,
        labels: Tensor | None = None,
        description: str = "Drawing samples",
    ) -> Tensor:
        """Draws `cfg.num_samples` samples, uint8 (n, C, H, W) of native size.

        Each rank draws a share and returns all; `labels` (n,) replace the cycling classes.
        """
        ids = shard(cfg.num_samples, *rank_and_world())
        labels = None if labels is None else labels[ids]
        with self.autocast:
            batches = draw(pipeline, ids, cfg.batch_size, cfg.seed, labels, description)
            parts = [self.datamodule.to_native(batch.cpu()) for batch in batches]
        return gather_shards(parts)

    def record(
        self,
        cfg: DictConfig,
        results: dict[str, float],
        protocol: Protocol,
        extra: Sequence[dict[str, object]],
        sampling_seconds: float | None = None,
    ) -> Path:
        """Writes an evaluation into the folder `cfg.run`; returns its file."""
        facts = self.weights | {"sampling_seconds": sampling_seconds}
        return save_evaluation(cfg.run, results, protocol, cfg, facts, extra)

    @property
    def autocast(self) -> torch.autocast:
        """The autocast context in which to call the networks."""
        return autocast(self.precision, self.device)

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        """Builds the metrics of `cfg.metrics`, loaded but not prepared; reads the data."""
        metrics = instantiate(cfg, "metrics")
        guided = OmegaConf.select(cfg, "guidance.classifier") is not None
        with errors_at(cfg, "metrics"):
            by_class = (self.conditional or guided) and self.datamodule.num_classes > 0
            metrics.check(by_class, self.datamodule.num_classes)
        read_data(self.saved, self.datamodule)
        with errors_at(cfg, "metrics"):
            metrics.reference_split(self.datamodule)  # raises if there are no such images
            metrics.load(self.datamodule, self.device)
        return metrics


def say_left_out(metrics: GenerativeMetrics, why: str) -> None:
    """Says which metrics of classes are left out of an evaluation, if there are any."""
    wanted = [m.quantities[0].title for m in metrics.metrics if m.needs_labels]
    if wanted:
        say(f"Left out, as {why}: {', '.join(wanted)}")


def weights_choice(cfg: DictConfig) -> WeightsChoice:
    """The weights of the run `cfg.run` that `cfg.average` and `cfg.step` choose.

    The step becomes a number, or null if it is the newest one's. Raises UserError if the run does
    not keep its checkpoint.
    """
    average = cfg.get("average")
    choice = WeightsChoice(Path(cfg.run), None if average is None else name_of(average))
    if cfg.get("step") is None:
        return choice
    if (Path(cfg.run) / EXPORTED).is_file():
        raise UserError(
            f"step={cfg.step} cannot be chosen in {cfg.run}, an export, which has one set of "
            "weights; leave step out"
        )
    cfg.step, path = kept_checkpoints.chosen(cfg.run, cfg.step) or (None, None)
    return replace(choice, checkpoint=path)


def move_data(source: DictConfig, folder: str) -> None:
    """Sets the root of a data source to `folder`, or moves its path and test_path there."""
    keys = [key for key in ("path", "test_path") if source.get(key)]
    moved = {key: str(Path(folder) / Path(source[key]).name) for key in keys}
    if "root" in source:
        moved = {"root": folder}
    if not moved:
        raise UserError(f"data_root={folder}, but this run's data are not in files; leave it out")
    source.update(verbatim(moved))
