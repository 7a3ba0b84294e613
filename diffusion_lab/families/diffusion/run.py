"""The runs of diffusion models: opening them, and loading their models and weak models."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.families import DIFFUSION, family_of
from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.model import Drawable, untrained_jumps
from diffusion_lab.assembly.objects import build_drawable, build_pipeline
from diffusion_lab.assembly.pipeline import Pipeline
from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.data import ImageData
from diffusion_lab.data.augmentation import mirrors
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.opened import NetworkRun, load_diffusion_config
from diffusion_lab.runs.weights import WeightsChoice, load_weights

JUDGES = ("metrics.classifier", "metrics.extractor.path")  # keys of classifiers that metrics use


@dataclass(frozen=True)
class DiffusionRun(NetworkRun):
    """The open run of a diffusion model."""

    model: Drawable
    weak: dict[str, Denoiser | None] = field(default_factory=dict)  # models of weak runs by folder

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageData) -> tuple[Drawable, FirstStage]:
        model = build_drawable(saved, datamodule.image_shape, datamodule.labels)
        return model, model.first_stage

    @staticmethod
    def network_of(model: Drawable) -> Denoiser:
        return model.denoiser

    @property
    def mirrored(self) -> bool:
        """Whether the model was trained on mirror images of its data, too."""
        return self.datamodule.flip or mirrors(self.model.augmentation)

    def pipeline(self, cfg: DictConfig) -> Pipeline:
        folder = cfg.guidance.weak_run
        if folder not in self.weak:
            self.weak[folder] = load_weak(folder, self.saved, self.model)
        kind, classifier = self.datamodule.labels, load_classifier(cfg, self.datamodule)
        pipeline = build_pipeline(cfg, self.model, kind, self.weak[folder], classifier)
        if line := untrained_jumps(self.model.loss, pipeline.sampler, self.model.schedule):
            say(line)
        return pipeline


RUN = DiffusionRun


def open_diffusion_run(cfg: DictConfig) -> DiffusionRun:
    """Opens the run `cfg.run` of a diffusion model; raises UserError for another kind of run."""
    return DiffusionRun.open(cfg, load_diffusion_config(cfg.run))


def load(
    folder: str | Path, saved: DictConfig | None = None, average: str | None = None
) -> tuple[ImageData, Drawable]:
    """Loads the data module (unread) of a trained run or export, and its model.

    The denoiser is on the CPU, in evaluation mode. The run's configuration describes the model;
    pass it as `saved` if it has been read already. `average` names an average of the weights; None
    is the one that the run evaluates. Raises UserError if the weights are missing or damaged.
    """
    choice = WeightsChoice(Path(folder), average)
    saved = saved or load_config(folder)
    if (family := family_of(saved)) != DIFFUSION:
        raise UserError(
            f"{folder} holds a model of family={family}, and this is for diffusion models; open it "
            'with diffusion_lab.command, for example command("sample", ...)'
        )
    fields = DiffusionRun.with_weights(choice.folder, saved, load_weights(choice)[0])
    return fields["datamodule"], fields["model"]


def load_weak(folder: str | None, saved: DictConfig, model: Drawable) -> Denoiser | None:
    """Loads the denoiser of `guidance.weak_run`, if any, for the `model` of the run `saved`.

    Raises UserError if the weak run was trained on other images, labels or noise levels.
    """
    if folder is None:
        return None
    name, other = f"guidance.weak_run={folder}", load_config(folder)
    if other.get("schedule") is None:
        raise UserError(
            f"{name} is no diffusion model; give the run of one that differs only in size or "
            "training time"
        )
    if other.schedule != saved.schedule:
        raise UserError(f"{name} was trained with another schedule; give a run with the same one")
    _, weak = load(folder, other)
    require_same_space(name, weak, model)
    asked = [(each.loss.two_levels, each.loss.of_samples) for each in (weak, model)]
    if asked[0] != asked[1]:
        raise UserError(
            f"{name} was trained with another objective/loss, so the two networks answer "
            "different questions; give a run that differs only in size or training time"
        )
    return weak.denoiser.requires_grad_(False)


def require_same_space(name: str, other: Drawable, model: Drawable) -> None:
    """Raises UserError, about the run `name`, unless two models draw images in one space."""
    theirs, ours = space_of(other), space_of(model)
    for part, value in theirs.items():
        if value != ours[part]:
            raise UserError(
                f"{name} was trained with another {part} than this run; give a run with the same "
                "one, or train with its own"
            )


def space_of(model: Drawable) -> dict[str, object]:
    """The facts that a model shares with those that are asked beside it, by what they are."""
    heard, stage = model.denoiser.conditioning, model.first_stage
    labels = (heard.labels.shape, heard.labels.classes, getattr(heard, "sizes", None))
    scaling = [torch.as_tensor(getattr(stage, name, 0.0)).flatten() for name in ("scale", "shift")]
    return {
        "size of images": stage.image_shape,
        "conditioning": (type(heard).__name__, *labels),
        "first_stage": (type(stage).__name__, stage.latent_shape, getattr(stage, "sha256", None)),
        "first_stage.scale or shift": [each.tolist() for each in scaling],
    }


def load_classifier(cfg: DictConfig, datamodule: ImageData) -> Classifier | None:
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
