"""A training run before it starts, in parts that are built or measured when asked for."""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.backbone.macs import Cost
from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.objects import build_datamodule, load_data
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import float32_products, pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.source import decoding
from diffusion_lab.diffusion.objective import TeacherModel
from diffusion_lab.families.diffusion.task import DiffusionTask, build_task
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.profiling.costs import ImageFacts, calls_of_one_network, cost_of
from diffusion_lab.profiling.timing import Bench, median_seconds
from diffusion_lab.training.callbacks.periodic import times
from diffusion_lab.training.doctor.finding import Missing, part
from diffusion_lab.training.train import check_settings
from diffusion_lab.training.trainer import check_trainer, steps_in_time

SAMPLE = 1000  # images, enough to know a standard deviation to about 1 %
TIMED_STEPS = 3
FEATURE_IMAGES = 64  # batch of the feature extractor, as in the metrics
STATE_BYTES = 16  # per parameter in float32: weight, gradient, Adam's two moments
UNMEASURED = "not measured: speed=false, a precision for training only, or too little memory"


class Memory(NamedTuple):
    """The bytes of device memory that training needs, the part per image, and those free."""

    needed: float
    per_image: float
    free: float


class Plan(NamedTuple):
    """The steps that a run will take, and its seconds; `drawing` is None if it is not known."""

    steps: int
    training: float  # including the validation loss
    drawing: float | None  # grids, and samples for the metrics
    features: float  # including the reference's, which are cached for the next run


class PlannedRun:
    """The parts of the run that `cfg` describes; a part that cannot be made raises Missing."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.refusals: dict[str, str] = {}  # why parts could not be made

    @part("settings")
    def settings(self) -> DictConfig:
        """The configuration, once its numbers are checked."""
        check_settings(self.cfg)
        return self.cfg

    @part("batch")
    def batch(self) -> BatchLayout:
        """The layout of the batch over the devices of the run."""
        world = math.prod(launch.processes(self.settings.trainer))
        return solve_batch(self.cfg.batch_size, world, self.cfg.micro_batch_size)

    @part("device")
    def device(self) -> torch.device:
        """The device on which this process would train."""
        return launch.device_of_process(self.cfg.trainer)

    @cached_property
    def precision(self) -> str:
        """Lightning's precision, with `auto` resolved."""
        return pick_precision(self.settings.trainer.precision, self.device)

    @part("data")
    def datamodule(self) -> ImageDataModule:
        """The data module, before it reads the data."""
        return build_datamodule(self.cfg)

    @part("data")
    def data(self) -> ImageDataModule:
        """The data module, after it has read the data and its splits are checked."""
        load_data(self.cfg, self.datamodule)
        return self.datamodule

    @cached_property
    def sample(self) -> Tensor:
        """At most SAMPLE training images, uint8 (n, C, H, W), padded as for training."""
        return self.data.trained_on(SAMPLE).images

    @part("trainer")
    def trained_batch(self) -> BatchLayout:
        """The layout of the batch, once a trainer could be built for it."""
        check_trainer(self.cfg, self.batch)
        return self.batch

    @part("composition")
    def task(self) -> DiffusionTask:
        """Everything that is built from the configuration, with the network on device "meta"."""
        _ = self.trained_batch, self.datamodule  # first, so their refusals are not reported twice
        task = build_task(self.cfg, device="meta")
        task.check_callbacks(self.batch, self.cfg.trainer)
        return task

    @cached_property
    def clean(self) -> Tensor:
        """The sample as the first stage encodes it for diffusion, float (n, c, h, w)."""
        return self.task.module.first_stage.encode(self.sample)

    @part("extractor")
    def metrics(self) -> GenerativeMetrics | None:
        """The metrics with their networks loaded; None if nothing is evaluated."""
        if self.task.metrics is not None:
            with errors_at(self.cfg, "metrics"):
                self.task.metrics.load(self.datamodule, self.device)
        return self.task.metrics

    @cached_property
    def image_facts(self) -> ImageFacts:
        """The shape of the images as trained on, and their number of classes."""
        return ImageFacts(self.datamodule.image_shape, self.datamodule.labels)

    @cached_property
    def cost(self) -> Cost:
        """Parameters and MACs of the network on one image."""
        _ = self.task
        return cost_of(self.cfg, self.image_facts)

    @cached_property
    def free_bytes(self) -> int | None:
        """The device's free memory before it holds a model; None if the system does not say."""
        with suppress(Missing):
            _ = self.metrics  # loaded first: their networks take memory during a run, too
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return decoding.free_memory()

    @part("memory")
    def bench(self) -> Bench:
        """The model on the device, with a micro-batch."""
        _ = self.task, self.free_bytes
        if not self.cfg.speed or self.precision not in ("32-true", "bf16-mixed"):
            raise Missing(UNMEASURED)
        cfg = self.cfg.copy()
        cfg.batch_size = self.batch.micro_batch
        bench = Bench(cfg, self.image_facts, self.device, self.precision)
        asked = bench.model.objective.teacher
        if self.task.teacher is not None and isinstance(asked, TeacherModel):
            self.task.teacher.answer(asked, self.device)
        return bench

    @part("memory")
    def memory(self) -> Memory:
        """The bytes that a training step holds, for the network's state and for its images."""
        image = self.bench.activation_bytes()
        if self.free_bytes is None:
            raise Missing(UNMEASURED)
        state = STATE_BYTES + 4 * self.task.averages
        needed = state * self.cost.params + image * self.batch.micro_batch
        return Memory(needed, image, self.free_bytes)

    @part("memory")
    def seconds(self) -> tuple[float, float, float]:
        """Seconds per micro-batch of training, per image of a network call, per image of features.

        The model is compiled as in training, if it fits into memory; calls and features are divided
        over the devices of the run.
        """
        # activation memory is measured before compilation
        if self.free_bytes is not None and self.memory.needed > self.memory.free:
            raise Missing(UNMEASURED)
        bench, micro, world = self.bench, self.batch.micro_batch, self.batch.world
        bench.compile(self.cfg.compile)
        works: list[Callable[[], object]] = [bench.train, bench.call]
        if self.metrics is not None:
            images = bench.images[torch.arange(FEATURE_IMAGES, device=self.device) % micro]
            works.append(partial(self.metrics.observer, images))
        with float32_products(self.cfg.get("matmul_precision")):
            step, call, *features = median_seconds(works, self.device, TIMED_STEPS)
        return step, call / micro / world, sum(features) / FEATURE_IMAGES / world

    @cached_property
    def plan(self) -> Plan:
        """The steps that the run's time limit allows, and their seconds."""
        steps, limit = self.cfg.trainer.max_steps, self.cfg.trainer.max_time
        whole = self.plan_of(steps)
        # grids and validation losses count against the limit; the final metrics come after it
        allowed = steps_in_time(limit, steps, whole.training)
        return whole if allowed == steps else self.plan_of(allowed)

    @cached_property
    def calls(self) -> int | None:
        """The number of network calls per sampled image; None if it is not known."""
        return calls_of_one_network(self.cfg, self.image_facts)

    def plan_of(self, steps: int) -> Plan:
        """Returns the plan of a run of `steps` steps."""
        (step, call, features), metrics = self.seconds, self.task.metrics
        measured, real = self.task.measured_images(steps), 0
        if metrics:
            real = len(metrics.reference_ids(self.data)) + len(metrics.test_ids(self.data))
        validations = times(steps, self.cfg.validate_every_n_steps)
        validated = validations * len(self.data.validated_on().labels)
        drawn = measured + self.task.grid_images(steps)
        return Plan(
            steps,
            steps * self.batch.accumulate * step + validated * call,
            None if self.calls is None else drawn * self.calls * call,
            (measured + real) * features,
        )

    @cached_property
    def steps(self) -> int:
        """The optimiser steps of the run, cut at its time limit if its speed is known."""
        with suppress(Missing):
            return self.plan.steps
        return self.cfg.trainer.max_steps

    @property
    def images_seen(self) -> int:
        """The number of training images that the run sees."""
        return self.steps * self.batch.batch_size
