"""The runs of diffusion models: opening them, and loading their models and weak models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.model import Model
from diffusion_lab.build.objects import build_datamodule, build_model, build_pipeline
from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.data import ImageDataModule
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.open_run import OpenRun
from diffusion_lab.runs.weights import load_into, load_weights

PLACES = ("run", "path", "cache", "cache_dir")  # settings of a group that only say where files are
JUDGES = ("metrics.classifier", "metrics.extractor.path")  # keys of classifiers that metrics use


@dataclass(frozen=True)
class DiffusionRun(OpenRun):
    """The open run of a diffusion model."""

    command: ClassVar[str] = "train"

    model: Model
    weak: dict[str, Denoiser | None] = field(default_factory=dict)  # models of weak runs by folder

    @classmethod
    def load(
        cls,
        folder: Path,
        saved: DictConfig,
        device: torch.device,
        average: str | None,
        checkpoint: Path | None,
    ) -> dict[str, Any]:
        state = load_weights(folder, average, checkpoint)
        datamodule, model = with_weights(folder, saved, state)
        model.denoiser.to(device).requires_grad_(False)
        return {"datamodule": datamodule, "model": model}

    @property
    def conditional(self) -> bool:
        return self.model.denoiser.conditioning.conditional

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        return self.model.first_stage.reconstruction_metrics(self.datamodule)

    def pipeline(self, cfg: DictConfig) -> Pipeline:
        folder = cfg.guidance.weak_run
        if folder not in self.weak:
            self.weak[folder] = load_weak(folder, self.saved)
        classes, classifier = self.datamodule.num_classes, load_classifier(cfg, self.datamodule)
        return build_pipeline(cfg, self.model, classes, self.weak[folder], classifier)


def load(
    folder: str | Path, saved: DictConfig | None = None, average: str | None = None
) -> tuple[ImageDataModule, Model]:
    """Loads the data module (unread) of a trained run or export, and its model.

    The denoiser is on the CPU, in evaluation mode. The run's configuration describes the model;
    pass it as `saved` if it has been read already. `average` names an average of the weights; None
    is the one that the run evaluates. Raises UserError if the weights are missing or damaged.
    """
    return with_weights(folder, saved or load_config(folder), load_weights(folder, average))


def with_weights(
    folder: str | Path, saved: DictConfig, state: dict[str, Tensor]
) -> tuple[ImageDataModule, Model]:
    """Builds the data module (unread) and the model of a run, with the denoiser weights `state`.

    Raises UserError if the weights belong to another model.
    """
    datamodule = build_datamodule(saved)
    model = build_model(saved, datamodule.image_shape, datamodule.num_classes)
    load_into(model.denoiser, state, folder)
    model.denoiser.eval()
    return datamodule, model


def load_weak(folder: str | None, saved: DictConfig) -> Denoiser | None:
    """Loads the denoiser of `guidance.weak_run`, if any, for a run with the configuration `saved`.

    Raises UserError if the weak run was trained on other data, labels or noise levels.
    """
    if folder is None:
        return None
    other = load_config(folder)
    for part in ("schedule", "first_stage", "conditioning"):
        theirs, ours = (
            {key: value for key, value in each[part].items() if key not in PLACES}
            for each in (other, saved)
        )
        if theirs != ours:
            raise UserError(
                f"guidance.weak_run={folder} was trained with another {part}; give a run that "
                "differs only in size or training time"
            )
    data, model = load(folder, other)
    own = build_datamodule(saved)
    if (data.image_shape, data.num_classes) != (own.image_shape, own.num_classes):
        raise UserError(
            f"guidance.weak_run={folder} was trained on images of shape {data.image_shape} in "
            f"{data.num_classes} classes, but this run on {own.image_shape} in "
            f"{own.num_classes}; give a run on the same data"
        )
    return model.denoiser.requires_grad_(False)


def load_classifier(cfg: DictConfig, datamodule: ImageDataModule) -> Classifier | None:
    """Loads the classifier of `cfg.guidance`, on the CPU, if one guides.

    Raises UserError if it does not fit the data, or if the metrics of `cfg` use it, too.
    """
    path = cfg.guidance.get("classifier")
    if path is None:
        return None
    classifier = Classifier(str(path))
    classifier.argument = "classifier"
    with errors_at(cfg, "guidance"):
        classifier.load("cpu")
        classifier.check(datamodule)
    checksum = hashing.of_file(Path(path))
    for key in JUDGES:
        judge = OmegaConf.select(cfg, key)
        if judge and Path(judge).is_file() and hashing.of_file(Path(judge)) == checksum:
            raise UserError(
                f"{key}={judge} is the classifier that guides the samples, so it would find its "
                "own classes in them; measure with another one, trained with another seed"
            )
    return classifier
