"""A diffusion model for a training loop of one's own, from the options of the command line."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffusion_lab.assembly.families import require_diffusion
from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.model import Model, check_network
from diffusion_lab.assembly.objects import build_images, build_model, build_pipeline
from diffusion_lab.assembly.pipeline import draw
from diffusion_lab.assembly.sentences import MISTAKES, composed, sentence
from diffusion_lab.common.labels import Classes, Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import whole
from diffusion_lab.data.augmentation import augment
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.families.diffusion.run import load_classifier, load_weak
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.runs.opened import load_diffusion_config
from diffusion_lab.runs.pretrained import local
from diffusion_lab.runs.search import run_at
from diffusion_lab.runs.weights import WeightsChoice, load_into, load_weights

BATCH = 100  # samples that are drawn at once
LARGEST = 2.0  # above 1, as enlarged or noisy images may be; images from 0 to 255 are not meant
Label = int | str  # a class, by its number or its name


class DiffusionModel(nn.Module):
    """A network, the objective that trains it, and the sampler that draws from it.

    `build` and `load` make one. Its parameters are those to train, in a loop of one's own.
    """

    def __init__(self, cfg: DictConfig, parts: Model, labels: Labels):
        super().__init__()
        self.cfg = cfg  # of a training; its sampler and guidance draw, if `sample` is given none
        self.parts = parts
        self.kind = labels
        self.denoiser, self.objective = parts.denoiser, parts.objective

    def loss(self, images: Tensor, labels: Tensor | None = None, images_seen: int = 0) -> Tensor:
        """The mean loss, (), of images (B, C, H, W), uint8 or float in [-1, 1].

        `labels` (B,) int64 are those of the images; without them the model is told none.
        `images_seen` are the training images before these, for losses that change during training.
        Raises ValueError for images of another shape, or float images of a latent model, and on a
        CPU for other labels or values, and UserError if `diffusion-lab train` adds to this loss.
        """
        teacher = self.objective.teacher
        unopened = teacher is not None and teacher.asked and not teacher.opened
        for key, missing in (
            ("objective.teacher", unopened),
            ("alignment", self.cfg.get("alignment")),
        ):
            if missing:
                raise UserError(
                    f"{key} is set up by `diffusion-lab train`, and this loss would leave it out; "
                    "train such a run with that command"
                )
        stage = self.parts.first_stage
        if tuple(images.shape[1:]) != stage.image_shape:
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, but the model is for {stage.image_shape}"
            )
        if images.device.type == "cpu":  # elsewhere a look at values would wait
            self.check(images, labels)
        augmented = None
        if not images.is_floating_point():
            images, augmented = augment(self.parts.augmentation, images)
            x0 = stage.draw(stage.moments(images))
        elif stage.of_pixels and self.parts.augmentation is None:
            x0 = images
        else:
            raise ValueError("images must be uint8: they are augmented or encoded")
        given = Given(labels, augmentation=augmented)
        return self.objective(self.denoiser, x0, given, images_seen=images_seen).minimised.mean()

    def check(self, images: Tensor, labels: Tensor | None) -> None:
        """Raises ValueError for float images far outside of [-1, 1], and for unknown classes."""
        if images.is_floating_point() and images.abs().max() > LARGEST:
            raise ValueError("float images must be in [-1, 1]; write images / 127.5 - 1")
        if labels is None or not self.kind.classes:
            return
        wrong = labels.is_floating_point() or labels.shape != images.shape[:1]
        if wrong or labels.min() < 0 or labels.max() >= self.kind.classes:
            raise ValueError(
                f"labels must be ({len(images)},) int64 from 0 to {self.kind.classes - 1}"
            )

    def sample(
        self,
        count: int,
        labels: Label | Sequence[Label] | Tensor | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Draws images, uint8 (count, C, H, W), each fixed by the seed and its place.

        `labels` is a class, or one for each image; without it, classes take turns. `sampler` is an
        option of that group, such as "heun", and `guidance` the scale of classifier-free guidance;
        without them, and without `steps`, those of the configuration draw. Raises UserError.
        """
        if count < 1:
            raise UserError(f"count={count} must be at least 1")
        if not whole(0).allows(seed):
            raise UserError(f"seed={seed} must be {whole(0).wanted}")
        cfg = self.cfg.copy()
        if sampler is not None:
            cfg.sampler = configured(f"sampler={sampler}").sampler
        if steps is not None:
            cfg.sampler.steps = steps
        if guidance is not None:
            cfg.guidance = configured("guidance=classifier_free").guidance
            cfg.guidance.scale = guidance
        guides = self.guides if guidance is None else (None, None)
        pipeline = build_pipeline(cfg, self.parts, self.kind, *guides)
        if labels is not None and not pipeline.conditional:
            raise UserError("labels were given, but this model is unconditional; leave labels out")
        chosen = None if labels is None else self.chosen(labels, count)
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            return torch.cat([*draw(pipeline, range(count), BATCH, seed, chosen)])
        finally:
            self.denoiser.train(training)

    @cached_property
    def guides(self) -> tuple[Denoiser | None, Classifier | None]:
        """The weak model and the classifier of the configuration's guidance, loaded once.

        They are no parts of this module, which would train them.
        """
        weak = load_weak(self.cfg.guidance.get("weak_run"), self.cfg, self.parts)
        if "classifier" not in self.cfg.guidance:  # for which the images are built
            return weak, None
        return weak, load_classifier(self.cfg, build_images(self.cfg))

    def chosen(self, labels: Label | Sequence[Label] | Tensor, count: int) -> Tensor:
        """Labels of `count` images, (count,) int64, from one for all or one for each."""
        if isinstance(labels, int | str):
            labels = [labels] * count
        given = labels.tolist() if isinstance(labels, Tensor) else [*labels]
        if len(given) != count:
            raise UserError(f"{len(given)} labels are given for {count} images; give one for each")
        try:
            return self.kind.parse(given)
        except ValueError as error:
            raise UserError(f"labels {error}") from error


def build(
    *overrides: str, image_shape: tuple[int, int, int], num_classes: int = 0
) -> DiffusionModel:
    """Builds the model that `diffusion-lab train` would train with these overrides.

    It is for images of `image_shape` (C, H, W), with `num_classes` classes; with none it is
    unconditional. Raises UserError with the sentence that the command line would print, and for
    what only `diffusion-lab train` sets up, such as a teacher.

        build("backbone=dit", "backbone.width=64", image_shape=(1, 28, 28), num_classes=10)
    """
    three = isinstance(image_shape, Sequence) and len(image_shape) == 3
    if not three or not all(map(whole(1).allows, image_shape)):
        raise UserError(f"image_shape={image_shape} must be (channels, height, width)")
    unconditional = [] if num_classes else ["conditioning=none", "guidance=none"]
    cfg, labels = configured(*unconditional, *overrides), Classes.numbered(num_classes)
    require_diffusion(cfg)
    for key in ("objective.teacher", "alignment", "init_from", "guidance.classifier"):
        if OmegaConf.select(cfg, key):
            raise UserError(
                f"{key} is set up by `diffusion-lab train`, not by build, which would leave it out"
            )
    if cfg.first_stage.get("scale") == "measured":
        raise UserError("first_stage.scale=measured needs training images; give build a number")
    parts = build_model(cfg, image_shape, labels)
    with errors_at(cfg, "backbone"):
        check_network(parts.denoiser, parts.objective)
    return DiffusionModel(cfg, parts, labels)


def load(run: str | Path, average: str | None = None) -> DiffusionModel:
    """Opens the diffusion model of a trained run or an export, with its averaged weights.

    `run` may be pretrained:NAME, too. `average` names another average of the weights. Raises
    UserError.
    """
    run = str(run_at(Path(local(str(run)))))
    saved = load_diffusion_config(run)
    data = build_images(saved)
    model = DiffusionModel(saved, build_model(saved, data.image_shape, data.labels), data.labels)
    load_into(model.denoiser, load_weights(WeightsChoice(Path(run), average))[0], run)
    return model


def configured(*overrides: str) -> DictConfig:
    """The configuration of a training; raises UserError for a wrong override."""
    try:
        return composed("train", [*overrides])
    except MISTAKES as error:
        raise UserError(sentence(error)) from error
