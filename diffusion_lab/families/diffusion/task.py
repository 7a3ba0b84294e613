"""The task of training a diffusion model, built from a configuration."""

from dataclasses import dataclass

import lightning
import torch
from omegaconf import DictConfig

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.costs import ImageFacts, counted
from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.assembly.model import (
    Model,
    check_network,
    check_steps,
    compile_model,
    rarely_trained,
    untrained_jumps,
)
from diffusion_lab.assembly.objects import build_model, build_pipeline, draws_pairs
from diffusion_lab.assembly.pipeline import Pipeline, with_steps
from diffusion_lab.backbone.macs import TRAINING_PASSES
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data import ImageData
from diffusion_lab.diffusion.denoiser import NOISE_LABELS
from diffusion_lab.families.diffusion.initial_weights import InitialWeights
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.families.diffusion.run import load_classifier, load_weak
from diffusion_lab.families.diffusion.teacher import Teacher
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.alignment import LayerLoss
from diffusion_lab.training.callbacks import DenoisingGrid, Evaluation, Grid
from diffusion_lab.training.callbacks.periodic import times
from diffusion_lab.training.module import Optimization
from diffusion_lab.training.task import Task, build_datamodule, checked_parts, other_steps


@dataclass(frozen=True, kw_only=True)
class DiffusionTask(Task):
    """Trains a denoiser, and draws samples with it during training."""

    module: DiffusionModule
    pipeline: Pipeline
    initial: InitialWeights | None = None
    teacher: Teacher | None = None

    def compile(self, mode: str | None) -> None:
        compile_model(self.module.denoiser, self.module.objective, mode)

    def advice(self) -> list[str]:
        denoiser, objective = self.module.denoiser, self.module.objective
        schedule, loss, sampler = objective.schedule, objective.loss, self.pipeline.sampler
        others = (with_steps(sampler, steps) for steps in other_steps(self.callbacks))
        warned = rules.warned(
            loss=loss,
            schedule=schedule,
            prediction=objective.prediction,
            time_sampler=objective.time_sampler,
            coupling=objective.coupling,
            teacher=objective.teacher,
            augmentation=self.module.augmentation,
            noise_label=next(k for k, of in NOISE_LABELS.items() if of is denoiser.noise_label),
            clipped=(self.pipeline.guidance.clip, denoiser.clip) != (None, None),
            flipped=self.datamodule.flip,
            conditional=denoiser.conditioning.conditional,
        )
        more = (
            rarely_trained(objective, sampler),
            *(untrained_jumps(loss, each, schedule) for each in (sampler, *others)),
            flatters(self.module.alignment, self.metrics),
        )
        return [*warned, *filter(None, more)]

    def prepare(self, device: torch.device) -> dict[str, object]:
        facts: dict[str, object] = {}
        if self.module.alignment and self.module.alignment.extractor:
            self.module.alignment.extractor.to(device)
        # before weights that bring the scale of numbers which they were trained with
        self.module.denoiser.conditioning.labels.learn(self.datamodule.train_labels())
        if self.initial:
            self.initial.load_into(self.module.denoiser)
            for each in self.module.keeping_magnitude:
                each.renormalise()
            facts |= self.initial.facts
        self.datamodule.encoded = self.module.first_stage.prepare(self.datamodule, device)
        if self.teacher:
            self.datamodule.encoded = self.teacher.prepare(device) or self.datamodule.encoded
            facts["objective.teacher.sha256"] = self.teacher.sha256
        facts["loss_facts"] = self.module.objective.loss.facts
        return facts | {"first_stage": self.module.first_stage.facts()}

    def costs(self) -> dict[str, object]:
        extra = self.module.objective.extra_passes(self.module.denoiser)
        passes: dict[str, object] = {
            "jumps": self.module.objective.loss.two_levels,
            "forward_passes": None if extra is None else TRAINING_PASSES + extra,
        }
        if self.teacher is None:
            return passes
        return passes | self.teacher.costs(self.datamodule, self.module.images_seen)

    def counts(self, cfg: DictConfig) -> dict[str, object]:
        data = self.datamodule
        try:
            cost = counted(cfg, ImageFacts(data.image_shape, data.labels))
            return {"macs": cost.macs, "forward_passes": cost.passes}
        except Exception as error:  # a custom network's: no reason to lose a trained run
            say(f"MACs could not be counted: {error}")
            return {}

    def measured_images(self, steps: int) -> int:
        """The number of samples in all evaluations of a run of `steps` steps."""
        evaluation = self.callback(Evaluation)
        if not self.metrics:
            return 0
        evaluations = times(steps, evaluation.every_n_steps)
        if others := getattr(evaluation, "also_steps", None):
            evaluations += round(sum(others) / self.pipeline.steps)  # as costly as these
        return evaluations * self.metrics.num_samples

    def grid_images(self, steps: int) -> int:
        """The number of images in all grids of a run of `steps` steps."""
        images = 0
        for grid in (each for each in self.callbacks if isinstance(each, Grid)):
            labels = self.pipeline.row_labels(grid.columns) if self.datamodule.num_classes else None
            rows = grid.columns if labels is None else len(labels)
            each = grid.samples if isinstance(grid, DenoisingGrid) else grid.columns * rows
            images += times(steps, grid.every_n_steps) * each
        return images


def build_task(cfg: DictConfig, device: str = "cpu") -> DiffusionTask:
    """Builds the task that a configuration describes; raises UserError for what cannot work."""
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    labels = datamodule.labels
    model = build_model(cfg, datamodule.image_shape, labels, device)
    if model.denoiser.self_conditioning and sharded(cfg.trainer):
        raise UserError(
            "denoiser.self_conditioning=true asks the network twice in a random half of each "
            "rank's steps, and with trainer=fsdp all ranks call it together; use trainer=ddp"
        )
    module = DiffusionModule(
        model.denoiser,
        model.objective,
        model.first_stage,
        Optimization.configured(cfg),
        model.augmentation,
        build_alignment(cfg, model, datamodule),
    )
    with errors_at(cfg, "backbone"):
        check_network(model.denoiser, model.objective)
    weak = load_weak(cfg.guidance.get("weak_run"), cfg, model)
    pipeline = build_pipeline(cfg, model, labels, weak, load_classifier(cfg, datamodule))
    parts = checked_parts(cfg, datamodule, module, pipeline)
    for steps in other_steps(parts["callbacks"]):
        check_steps(model, pipeline.sampler, steps)
    return DiffusionTask(
        **parts,
        initial=InitialWeights.configured(cfg),
        teacher=Teacher.opened(model, datamodule, cfg),
    )


def flatters(alignment: LayerLoss | None, metrics: GenerativeMetrics | None) -> str | None:
    """The warning that samples are judged by the network that training was aligned to, if so."""
    seen = None if alignment is None else alignment.extractor
    if seen is None or metrics is None or seen.name != metrics.extractor.name:
        return None
    return (
        f"FID on features of {metrics.extractor.name} flatters a model that was aligned to them; "
        "judge it by metrics.classifier, or by another metrics/extractor"
    )


def build_alignment(cfg: DictConfig, model: Model, datamodule: ImageData) -> LayerLoss | None:
    """The alignment that a configuration describes; UserError if the model cannot have it."""
    if not cfg.get("alignment"):  # older runs have none
        return None
    alignment = instantiate(cfg, "alignment")(denoiser=model.denoiser, schedule=model.schedule)
    if alignment.extractor is None:
        return alignment
    latent = not model.first_stage.of_pixels
    if latent and draws_pairs(model.objective.teacher):
        raise UserError(
            "alignment looks at images, and a teacher's pairs are latents; write alignment=none"
        )
    if latent and model.first_stage.cache:
        raise UserError(
            "alignment looks at images, and training on cached latents has none; write "
            "first_stage.cache=false"
        )
    with errors_at(cfg, "alignment"):
        alignment.extractor.check(datamodule)
    return alignment
