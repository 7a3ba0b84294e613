"""The parts that every training run is made of, whatever it trains."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly import families
from diffusion_lab.assembly.instantiate import class_of, errors_at, instantiate
from diffusion_lab.assembly.objects import build_images, wrong_data
from diffusion_lab.assembly.pipeline import Generator, Pipeline
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageData
from diffusion_lab.data.datamodule import ImageDataModule
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.quantity import VALIDATION, ceiling
from diffusion_lab.training.callbacks import (
    Checked,
    Checkpoint,
    Evaluation,
    MedianPruning,
    SampleEvaluation,
)
from diffusion_lab.training.callbacks.checkpoint import RANKING
from diffusion_lab.training.callbacks.evaluation import KEPT
from diffusion_lab.training.module import TrainedModule

# metrics of a pass for each noise level of a diffusion model, or channel of an autoencoder
OF_PARTS = ("val_by_level", "test_by_level", "val_latent", "test_latent")
REPLACED = {  # Lightning's callbacks that a run cannot have, and what to set instead
    StochasticWeightAveraging: "callbacks.weight_averaging",
    WeightAveraging: "callbacks.weight_averaging",
    GradientAccumulationScheduler: "micro_batch_size, by which a batch is accumulated",
    BatchSizeFinder: "batch_size and micro_batch_size",
    LearningRateFinder: "optimizer.lr",
}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Everything that a run trains and measures with, built and checked before any file exists."""

    command: ClassVar[str] = "train"  # the command that trains it

    datamodule: ImageDataModule
    module: TrainedModule
    callbacks: list[Callback]
    metrics: GenerativeMetrics | None
    pipeline: Generator | None = None  # None: the trained network makes no samples

    @property
    def first_stage(self) -> FirstStage | None:
        """The first stage on whose latents or codes the network is trained, if it has one."""
        return getattr(self.module, "first_stage", None)

    def callback(self, kind: type[Callback]) -> Any:
        """The first callback of a class, or None if the run has no such callback."""
        return next((each for each in self.callbacks if isinstance(each, kind)), None)

    def costs(self) -> dict[str, object]:
        """More entries of the summary: what was spent before the run, as on a teacher."""
        return {}

    @abstractmethod
    def compile(self, mode: str | None) -> None:
        """Compiles the costly modules in place, so that keys stay; as `compile_network` does."""

    def check_validation(self, cfg: DictConfig, data: ImageData) -> None:
        """Raises UserError if the run selects by metrics or images that it does not have."""
        ranked_by = [c.best for c in self.callbacks if isinstance(c, Checkpoint) and c.best]
        self.check_ranking(ranked_by)
        pruning = [each.metric for each in self.callbacks if isinstance(each, MedianPruning)]
        metric = str(cfg.optimized_metric or "")
        for each in pruning:
            if not (each.startswith("val") and self.measures(each)):
                raise UserError(
                    f"callbacks.pruning.metric={each} is not measured by validations; use one of "
                    f"{', '.join(self.validations)}"
                )
        if metric and not self.measures(metric):
            known = ", ".join([*self.quantities, *self.validations])
            raise UserError(
                f"optimized_metric={metric} is not measured by this run; use one of {known}"
            )
        if len(data.validation_labels()):
            return
        of_validation = re.match("val(_by_level|_latent)?/", metric)
        selecting = [f"optimized_metric={metric}"] if of_validation else []
        selecting += ["callbacks.pruning"] * len(pruning)
        selecting += [f"callbacks.checkpoint.best={each}" for each in ranked_by]
        if selecting:
            raise UserError(
                f"{selecting[0]} needs validation images, and no training images are kept for "
                "validation; write data.validation_size=auto or a number"
            )

    @property
    def validations(self) -> list[str]:
        """The names of the metrics by which validations can choose, the one that is shown first."""
        return [f"val/{self.module.shown}"]

    @property
    def quantities(self) -> list[str]:
        """The names of the metrics of images that the run measures."""
        metrics = self.metrics.metrics if self.metrics else []
        names = [quantity.name for each in metrics for quantity in each.quantities]
        if self.pipeline:
            return names
        return [f"r{name}" for name in names if name.startswith(KEPT)]

    def measures(self, metric: str) -> bool:
        """Whether the run measures a metric, such as val/loss, fid, fid_class3 or fid/<how>."""
        kind, _, own = metric.partition("/")
        if kind in ("val", "test"):
            name = f"val/{own}"
            # an autoencoder's validations have more, of its bottleneck
            return name in self.validations or (self.pipeline is None and name not in VALIDATION)
        known = re.sub(r"^fid_class\d+$", "fid_class", kind) in self.quantities
        return known or (bool(own) and kind in OF_PARTS)

    def check_ranking(self, ranked_by: Sequence[str]) -> None:
        """Raises UserError if checkpoints are ranked by a metric that is not of validation images.

        Every run measures one of its validations, and of samples what `metrics` has.
        """
        known, drawing = self.validations[0], self.pipeline is not None
        instead = f", or best={known}" if known in VALIDATION else ""
        of_validation = self.metrics is not None and self.metrics.reference == "validation"
        measured = self.quantities if drawing else []
        for metric in ranked_by:
            at = f"callbacks.checkpoint.best={metric}"
            if metric in self.validations:
                continue
            if metric not in measured:
                chosen = measured if of_validation else []
                others = [name for name in RANKING if name in [*self.validations, *chosen]]
                others = others or ["fid with metrics.reference=validation"]
                more = ", or let metrics and callbacks.evaluation measure it" if drawing else ""
                raise UserError(
                    f"{at} is not measured by this run; write {', '.join(others)}{more}"
                )
            if not of_validation:
                raise UserError(
                    f"{at} would choose by images that reports compare with; write "
                    f"metrics.reference=validation{instead}"
                )
            if self.callback(Evaluation).every_n_steps is None:
                raise UserError(
                    f"{at} is measured at the end of this run alone; write "
                    f"callbacks.evaluation.every_n_steps=1000{instead}"
                )

    def check_callbacks(self, layout: BatchLayout, trainer: DictConfig) -> None:
        """Raises UserError if a callback does not fit what is trained, or how it is."""
        for callback in self.callbacks:
            if isinstance(callback, Checked):
                callback.check(self.module, layout, trainer)

    def prepare(self, device: torch.device) -> dict[str, object]:
        """Reads the data before a run folder is made; returns entries for its configuration."""
        return {}

    def save_dependencies(self, folder: Path) -> None:
        """Copies the files that are needed to open a run into the new run's folder, on rank 0."""
        if self.first_stage is not None:
            self.first_stage.copy_into(folder)

    def advice(self) -> list[str]:
        """Returns sentences on settings that can be trained but may disappoint."""
        return []

    def with_ceiling(self, results: dict[str, float]) -> dict[str, float]:
        """Adds the best values that could be expected to the metrics of an evaluation."""
        if self.first_stage is None:
            return results
        return results | ceiling(results, self.first_stage.reconstruction_metrics(self.datamodule))

    def counts(self, cfg: DictConfig) -> dict[str, object]:
        """The entries of the summary on multiply-accumulates; none if they are not counted."""
        return {}

    def finish(self, folder: Path, results: dict[str, float], device: torch.device) -> None:
        """Writes the files of a finished run other than its summary, on rank 0."""
        return None


def build_task(cfg: DictConfig, device: str = "cpu") -> Task:
    """Builds the task that a configuration describes; raises UserError for what cannot work."""
    return families.part(cfg, "task").build_task(cfg, device)


def build_datamodule(cfg: DictConfig) -> ImageDataModule:
    """Builds the data of a configuration, with loaders; no image is read yet."""
    images = build_images(cfg)
    if isinstance(images, ImageDataModule):  # somebody's own
        return images
    if type(images) is not ImageData:  # whose methods would be lost
        raise wrong_data(cfg)
    return ImageDataModule(**{each.name: getattr(images, each.name) for each in fields(images)})


def checked_parts(
    cfg: DictConfig, data: ImageDataModule, module: TrainedModule, pipeline: Generator | None = None
) -> dict[str, Any]:
    """The fields of every task, with callbacks and metrics; raises UserError for wrong settings."""
    # for its errors: the optimiser that trains is made later, when parameters may be sharded
    module.optimizer()
    callbacks, classes, metrics = build_callbacks(cfg), data.num_classes, None
    if (also_steps := other_steps(callbacks)) and not isinstance(pipeline, Pipeline):
        family = f"family={cfg.family}" if "family" in cfg else "an autoencoder"
        raise UserError(
            f"callbacks.evaluation.also_steps={also_steps} is for samplers with a choice of steps, "
            f"and {family} has none; leave it out"
        )
    if any(isinstance(callback, Evaluation) for callback in callbacks):
        metrics = instantiate(cfg, "metrics")
        by_class = (pipeline is None or pipeline.conditional) and classes > 0
        with errors_at(cfg, "metrics"):
            metrics.check(by_class, classes)
    parts = {"datamodule": data, "module": module, "pipeline": pipeline}
    return parts | {"callbacks": callbacks, "metrics": metrics}


def other_steps(callbacks: list[Callback]) -> list[int]:
    """The numbers of steps of callbacks that also draw in others than the sampler's."""
    kinds = [each for each in callbacks if isinstance(each, SampleEvaluation)]
    return [steps for each in kinds for steps in each.also_steps or ()]


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """The configured callbacks in the order in which their hooks must run, by `phase` (0)."""
    callbacks: list[Callback] = []
    stateful: dict[str, str] = {}  # keys of those with a state, by its name in checkpoints
    for key in (f"callbacks.{name}" for name, settings in cfg.callbacks.items() if settings):
        if not OmegaConf.is_dict(OmegaConf.select(cfg, key)):
            raise UserError(f"{key} is an option of its own; {key}=null leaves it out")
        for kind, instead in REPLACED.items():
            if issubclass(class_of(cfg, key) or Callback, kind):
                raise UserError(
                    f"{key}: Lightning's {kind.__name__} does not work in a run; leave it out, and "
                    f"set {instead}"
                )
        callback = instantiate(cfg, key)
        if not isinstance(callback, Callback):
            raise UserError(f"{key}._target_ must be a Lightning callback")
        callbacks.append(callback)
        if type(callback).state_dict is Callback.state_dict:
            continue
        if other := stateful.get(callback.state_key):
            raise UserError(
                f"{key} would be a second {type(callback).__name__} beside {other}, and a "
                f"checkpoint holds the state of one; leave {key} out, or write {other}=null"
            )
        stateful[callback.state_key] = key
    return sorted(callbacks, key=lambda callback: getattr(callback, "phase", 0))
