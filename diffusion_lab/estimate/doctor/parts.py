"""The parts of a training run that doctor looks at, in the order in which they are made.

A part is made by a function of parts before it, which are its arguments by name.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from diffusion_lab.assembly.costs import ImageFacts, calls_of_one_network
from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.objects import build_datamodule, load_data
from diffusion_lab.common import rules
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import float32_products, pick_precision
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.source import decoding
from diffusion_lab.estimate.bench import Bench, median_seconds
from diffusion_lab.estimate.run_cost import (
    Duration,
    Memory,
    RunCost,
    counted,
    duration_of,
    memory_of,
)
from diffusion_lab.families.diffusion.task import DiffusionTask, build_task
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.train import check_settings
from diffusion_lab.training.trainer import check_trainer

SAMPLE = 1000  # images, enough to know a standard deviation to about 1 %
TIMED_STEPS = 3
FEATURE_IMAGES = 64  # batch of the feature extractor, as in the metrics


class Unknown(Exception):
    """Raised for a part that is not measured, or that the system does not tell."""


class BrokenRules(UserError):
    """The error for parts that cannot be combined, with a sentence for each rule."""


def checked(cfg: DictConfig) -> DictConfig:
    """The configuration, once its numbers are checked."""
    check_settings(cfg)
    return cfg


def layout_of(settings: DictConfig) -> BatchLayout:
    """The layout of the batch over the devices of the run."""
    world = math.prod(launch.processes(settings.trainer))
    return solve_batch(settings.batch_size, world, settings.micro_batch_size)


def loaded(cfg: DictConfig, datamodule: ImageDataModule) -> ImageDataModule:
    """The data module, after it has read the data and its splits are checked."""
    load_data(cfg, datamodule)
    return datamodule


def trainable(cfg: DictConfig, layout: BatchLayout) -> BatchLayout:
    """The layout of the batch, once a trainer could be built for it."""
    check_trainer(cfg, layout)
    return layout


def built(cfg: DictConfig, trainable: BatchLayout, facts: ImageFacts) -> DiffusionTask:
    """Everything that is built for images of these facts, with the network on device "meta"."""
    with rules.collected() as broken:
        task = build_task(cfg, device="meta")
        task.check_callbacks(trainable, cfg.trainer)
    if broken:
        raise BrokenRules(*dict.fromkeys(broken))
    return task


def loaded_metrics(
    cfg: DictConfig, task: DiffusionTask, device: torch.device
) -> GenerativeMetrics | None:
    """The metrics with their networks loaded; None if nothing is evaluated."""
    if task.metrics is not None:
        with errors_at(cfg, "metrics"):
            task.metrics.load(task.datamodule, device)
    return task.metrics


def counts_of(cfg: DictConfig, task: DiffusionTask, facts: ImageFacts) -> RunCost:
    """The cost of the run on any device."""
    return counted(cfg, facts, calls_of_one_network(cfg, facts))


def free_of(device: torch.device) -> int | None:
    """The device's free memory; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return decoding.free_memory()


def bench_of(
    cfg: DictConfig,
    task: DiffusionTask,
    facts: ImageFacts,
    layout: BatchLayout,
    device: torch.device,
    precision: str,
) -> Bench:
    """The model on the device, with a micro-batch."""
    if not cfg.speed or precision not in ("32-true", "bf16-mixed"):
        raise Unknown
    cfg = cfg.copy()
    cfg.batch_size = layout.micro_batch
    bench = Bench(cfg, facts, device, precision)
    teacher = bench.model.objective.teacher
    if task.teacher and teacher and teacher.asked:
        task.teacher.answer(teacher, device)
    return bench


def memory(
    cfg: DictConfig, task: DiffusionTask, layout: BatchLayout, image_bytes: int, free: int | None
) -> Memory:
    """The memory of a training step, if it and the free memory are known."""
    if free is None:
        raise Unknown
    try:
        activations = image_bytes * layout.micro_batch
        return memory_of(task, activations, layout.world, sharded(cfg.trainer))
    except UserError as error:  # an optimiser whose state cannot be counted without its numbers
        raise Unknown from error


def timed(
    cfg: DictConfig,
    layout: BatchLayout,
    counts: RunCost,
    bench: Bench,
    metrics: GenerativeMetrics | None,
    free: int | None,
    memory: Memory | None = None,
) -> tuple[RunCost, float]:
    """The cost of the run with its times, and the seconds of an image's features.

    The model is compiled as in training, if it fits into memory. Calls and features are divided
    over the devices of the run.
    """
    if memory and free and memory.total > free:
        raise Unknown
    bench.compile(cfg.compile)  # activations are measured before
    works: list[Callable[[], object]] = [bench.train, bench.call]
    if metrics is not None:
        images = bench.images[torch.arange(FEATURE_IMAGES, device=bench.device) % len(bench.images)]
        works.append(partial(metrics.observer, images))
    with float32_products(cfg.get("matmul_precision")):
        step, call, *features = median_seconds(works, TIMED_STEPS)
    call = call / layout.micro_batch / layout.world
    cost = replace(counts, memory=memory, step=layout.accumulate * step, call=call)
    return cost, sum(features) / FEATURE_IMAGES / layout.world


class Times(NamedTuple):
    """The times of a run, and the seconds of all features, with those that runs share."""

    run: Duration
    features: float


def times_of(
    cfg: DictConfig, task: DiffusionTask, data: ImageDataModule, timed: tuple[RunCost, float]
) -> Times:
    """The times of the run, of what its time limit allows."""
    cost, features = timed
    run = duration_of(cfg, task, cost, len(data.validated_on().labels))
    images, metrics = task.measured_images(run.steps), task.metrics
    if metrics:
        images += len(metrics.reference_ids(data)) + len(metrics.test_ids(data))
    return Times(run, images * features)


# the name of a part, that of the error if it cannot be made, and the function that makes it
PARTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("settings", "settings", checked),
    ("layout", "batch", layout_of),
    ("device", "device", lambda cfg: launch.device_of_process(cfg.trainer)),
    (
        "precision",
        "device",
        lambda settings, device: pick_precision(settings.trainer.precision, device),
    ),
    ("datamodule", "data", build_datamodule),
    ("facts", "data", lambda datamodule: ImageFacts(datamodule.image_shape, datamodule.labels)),
    ("data", "data", loaded),
    ("sample", "data", lambda data: data.trained_on(SAMPLE).images),
    ("trainable", "trainer", trainable),
    ("task", "composition", built),
    ("clean", "composition", lambda task, sample: task.module.first_stage.encode(sample)),
    ("metrics", "extractor", loaded_metrics),
    ("counts", "composition", counts_of),
    ("free", "memory", free_of),  # beside the networks of the metrics
    ("bench", "memory", bench_of),
    ("image_bytes", "memory", lambda bench: bench.activation_bytes()),
    ("memory", "memory", memory),
    ("timed", "memory", timed),
    ("times", "memory", times_of),
    ("steps", "time", lambda cfg, times=None: times.run.steps if times else cfg.trainer.max_steps),
    ("seen", "time", lambda steps, layout: steps * layout.batch_size),
)
