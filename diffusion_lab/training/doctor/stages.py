"""The stages of building a training run that is not made yet.

A stage takes earlier results by the names of its parameters, as a check does.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.backbone.macs import Cost
from diffusion_lab.build.objects import build_datamodule, read_data
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.images import pad_to
from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.profiling.costs import ImageFacts, cost_of, sampling_calls
from diffusion_lab.profiling.timing import Bench
from diffusion_lab.training.diffusion_task import DiffusionTask, build_diffusion_task
from diffusion_lab.training.doctor import estimates
from diffusion_lab.training.doctor.estimates import Plan, StepTimes
from diffusion_lab.training.train import check_settings
from diffusion_lab.training.trainer import check_trainer

SAMPLE = 1000  # images, which tell a standard deviation to about 1 %


class Memory(NamedTuple):
    """Bytes that training needs on a device, of these an image's, and those free."""

    needed: float
    per_image: float
    free: float


class Length(NamedTuple):
    """The optimiser steps of the run, and the images that it sees in them."""

    steps: int
    images_seen: int


def settings(cfg: DictConfig) -> DictConfig:
    """The configuration, its numbers checked."""
    check_settings(cfg)
    return cfg


def batch(settings: DictConfig) -> BatchLayout:
    """The batch on the devices of the run."""
    world = math.prod(launch.processes(settings.trainer))
    return solve_batch(settings.batch_size, world, settings.micro_batch_size)


def device(cfg: DictConfig) -> torch.device:
    """The device on which this process would train."""
    return launch.device_of_process(cfg.trainer)


def precision(cfg: DictConfig, device: torch.device) -> str:
    """Lightning's precision, with `auto` decided."""
    return pick_precision(cfg.trainer.precision, device)


def datamodule(cfg: DictConfig) -> ImageDataModule:
    """The data, unread."""
    return build_datamodule(cfg)


def image_facts(datamodule: ImageDataModule) -> ImageFacts:
    """The shape of the images as trained on, and their classes."""
    return ImageFacts(datamodule.image_shape, datamodule.num_classes)


def data(cfg: DictConfig, datamodule: ImageDataModule) -> ImageDataModule:
    """The data, read, and as the rest of the program takes them to be."""
    read_data(cfg, datamodule)
    check_splits(datamodule)
    return datamodule


def sample(data: ImageDataModule) -> Tensor:
    """At most SAMPLE of the images trained on, uint8 (n, C, H, W), as trained on."""
    images = data.train_images()
    images = images[random_places(len(images), SAMPLE)]
    return pad_to(images, data.pad) if data.pad else images


def trainer(cfg: DictConfig, batch: BatchLayout) -> BatchLayout:
    """The batch, which a trainer can be built for."""
    check_trainer(cfg, batch)
    return batch


def task(cfg: DictConfig, trainer: BatchLayout, datamodule: ImageDataModule) -> DiffusionTask:
    """Everything that is built of the configuration, the network without memory."""
    return build_diffusion_task(cfg, device="meta")


def clean(task: DiffusionTask, sample: Tensor) -> Tensor:
    """The sample as it is diffused, float (n, c, h, w)."""
    return task.module.first_stage.encode(sample)


def metrics(
    task: DiffusionTask, datamodule: ImageDataModule, device: torch.device
) -> GenerativeMetrics | None:
    """The metrics with their networks; None if nothing is evaluated."""
    if task.metrics is not None:
        task.metrics.load(datamodule, device)
    return task.metrics


def cost(cfg: DictConfig, task: DiffusionTask, image_facts: ImageFacts) -> Cost:
    """Parameters and MACs of the network on one image."""
    return cost_of(cfg, image_facts)


def free_bytes(device: torch.device) -> int | None:
    """The free memory, before a model is there."""
    return estimates.free_memory(device)


def bench(
    cfg: DictConfig,
    task: DiffusionTask,
    batch: BatchLayout,
    image_facts: ImageFacts,
    device: torch.device,
    precision: str,
) -> Bench | None:
    """The model on the device, with a micro-batch; None where nothing is to be measured."""
    if not cfg.speed or precision not in ("32-true", "bf16-mixed"):
        return None
    cfg = cfg.copy()
    cfg.batch_size = batch.micro_batch
    return Bench(cfg, image_facts, device, precision)


def memory(
    bench: Bench | None, free_bytes: int | None, cost: Cost, batch: BatchLayout
) -> Memory | None:
    """What training needs; None where it is not measured."""
    if bench is None or free_bytes is None:
        return None
    image = bench.activation_bytes()
    needed = estimates.memory_needed(cost.params, image, batch.micro_batch)
    return Memory(needed, image, free_bytes)


def step_times(
    cfg: DictConfig, bench: Bench | None, memory: Memory | None, metrics: GenerativeMetrics | None
) -> StepTimes | None:
    """Seconds of what a run does; None where it is not measured, or would not fit."""
    if bench is None or (memory and memory.needed > memory.free):
        return None
    return estimates.measure(bench, cfg.compile, metrics)


def plan(
    cfg: DictConfig,
    task: DiffusionTask,
    data: ImageDataModule,
    batch: BatchLayout,
    image_facts: ImageFacts,
    step_times: StepTimes | None,
) -> Plan | None:
    """How long the run takes, if it was measured."""
    if step_times is None:
        return None
    # a weak run is a second network
    calls = None if cfg.guidance.get("weak_run") else sampling_calls(cfg, image_facts)
    return estimates.plan(cfg, task, data, batch, step_times, calls)


def length(cfg: DictConfig, batch: BatchLayout, plan: Plan | None = None) -> Length:
    """How far the run goes, its time limit considered where the plan is known."""
    steps = plan.steps if plan else cfg.trainer.max_steps
    return Length(steps, steps * batch.batch_size)


# in their order, each with the name of its refusal; None cannot be refused
STAGES: dict[Callable, str | None] = {
    settings: "settings",
    batch: "batch",
    device: "device",
    precision: None,
    datamodule: "data",
    image_facts: None,
    data: "data",
    sample: None,
    trainer: "trainer",
    task: "composition",
    clean: None,
    metrics: "extractor",
    cost: None,
    free_bytes: None,
    bench: "memory",
    memory: "memory",
    step_times: "memory",
    plan: None,
    length: None,
}


def check_splits(datamodule: ImageDataModule) -> None:
    """Raises UserError unless both splits are as `DataSource` says they are."""
    name, shape = type(datamodule.source).__name__, datamodule.native_shape
    for split, images, labels in (
        ("training", datamodule.reference_images(), datamodule.reference_labels()),
        ("test", datamodule.test_images(), datamodule.test_labels()),
    ):
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != tuple(shape):
            raise UserError(
                f"the {split} images of {name} are {images.dtype} {tuple(images.shape)}; `load` "
                f"must give uint8 (N, {', '.join(map(str, shape))}), with 0 black and 255 white"
            )
        if len(images) == 0:
            raise UserError(f"{name} has no {split} images; `load` must give both splits")
        if labels.dtype != torch.int64 or len(labels) != len(images):
            raise UserError(
                f"the {split} labels of {name} are {labels.dtype} {tuple(labels.shape)}; `load` "
                f"must give int64 ({len(images)},), a label an image"
            )
