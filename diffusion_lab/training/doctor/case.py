"""A training run that is not made yet: its parts, each built when a check first asks for it."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.backbone import counting
from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.build.sentences import MISTAKES, sentence
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.images import pad_to
from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.profiling import costs as profiling
from diffusion_lab.profiling.timing import Bench
from diffusion_lab.training.diffusion_task import DiffusionTask, build_diffusion_task
from diffusion_lab.training.doctor.timing import (
    Plan,
    Speed,
    free_memory,
    measure,
    memory_needed,
    plan,
)
from diffusion_lab.training.train import check_settings
from diffusion_lab.training.trainer import check_trainer

SAMPLE = 1000  # images, which tell a standard deviation to about 1 %
Made = TypeVar("Made")


class Unavailable(Exception):
    """What a check needs cannot be had; why is among the case's refusals."""


class Case:
    """What checks look at. What cannot be built raises Unavailable, and leaves the others be.

    `refusals` are the reasons by name, one sentence each.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.refusals: dict[str, str] = {}

    def attempt(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` returns; Unavailable, and a refusal of that name, where it refuses."""
        if name not in self.refusals:
            try:
                with errors_at(self.cfg, ""):
                    return make()
            except MISTAKES as error:
                self.refusals[name] = sentence(error)
            except torch.OutOfMemoryError:
                self.refusals[name] = (
                    "a few steps do not fit into the device's memory; write a smaller "
                    "micro_batch_size, or wait until the device is free"
                )
        raise Unavailable(name)

    @cached_property
    def layout(self) -> BatchLayout:
        """The batch on the devices of the run."""
        cfg = self.cfg
        self.attempt("settings", lambda: check_settings(cfg))
        return self.attempt(
            "batch",
            lambda: solve_batch(
                cfg.batch_size,
                math.prod(launch.processes(cfg.trainer)),
                cfg.micro_batch_size,
            ),
        )

    @cached_property
    def device(self) -> torch.device:
        """Where this process would train."""
        return self.attempt("device", lambda: launch.device_of_process(self.cfg.trainer))

    @cached_property
    def precision(self) -> str:
        """Lightning's, with `auto` decided."""
        return pick_precision(self.cfg.trainer.precision, self.device)

    @cached_property
    def datamodule(self) -> ImageDataModule:
        """The data, unread."""
        return self.attempt("data", lambda: build_datamodule(self.cfg))

    @cached_property
    def data(self) -> ImageDataModule:
        """The data, read, and as the rest of the program takes them to be."""
        datamodule = self.datamodule

        def read() -> ImageDataModule:
            datamodule.prepare_data()
            datamodule.setup("fit")
            check_splits(datamodule)
            return datamodule

        return self.attempt("data", read)

    @cached_property
    def sample(self) -> Tensor:
        """At most SAMPLE of the images trained on, uint8 (n, C, H, W), as trained on."""
        images = self.data.train_images()
        images = images[random_places(len(images), SAMPLE)]
        return pad_to(images, self.data.pad) if self.data.pad else images

    @cached_property
    def parts(self) -> DiffusionTask:
        """Everything that is built of the configuration, the network without memory."""
        layout, _ = self.layout, self.datamodule
        self.attempt("trainer", lambda: check_trainer(self.cfg, layout))
        return self.attempt(
            "composition", lambda: build_diffusion_task(self.cfg, layout, device="meta")
        )

    @cached_property
    def clean(self) -> Tensor:
        """What is diffused of the sample, float (n, c, h, w)."""
        return self.parts.module.first_stage.encode(self.sample)

    @cached_property
    def metrics(self) -> GenerativeMetrics | None:
        """The metrics with their networks; None if nothing is evaluated."""
        metrics = self.parts.metrics
        if metrics is not None:
            self.attempt("extractor", lambda: metrics.load(self.datamodule, self.device))
        return metrics

    @cached_property
    def cost(self) -> counting.Cost:
        """Parameters and MACs of the network on one image."""
        _ = self.parts  # which says what cannot be built
        return profiling.cost_of(self.cfg, self.shape_and_classes)

    @property
    def shape_and_classes(self) -> profiling.ImageFacts:
        """Of the images as trained on."""
        return profiling.ImageFacts(self.datamodule.image_shape, self.datamodule.num_classes)

    @cached_property
    def bench(self) -> Bench | None:
        """The model on the device, with a micro-batch; None where nothing is to be measured."""
        if not self.cfg.speed or self.precision not in ("32-true", "bf16-mixed"):
            return None
        _ = self.parts  # which says what cannot be built
        cfg = self.cfg.copy()
        cfg.batch_size = self.layout.micro_batch
        return self.attempt(
            "memory", lambda: Bench(cfg, *self.shape_and_classes, self.device, self.precision)
        )

    @cached_property
    def memory(self) -> tuple[float, float, float] | None:
        """Bytes that training needs on a device, of these an image's, and those free; or None."""
        free = free_memory(self.device)  # before the model is there
        if self.bench is None or free is None:
            return None
        image = self.attempt("memory", self.bench.activation_bytes)
        return memory_needed(self.cost.params, image, self.layout.micro_batch), image, free

    @cached_property
    def speed(self) -> Speed | None:
        """Seconds of what a run does; None where it is not to be measured or would not fit."""
        memory = self.memory  # first, while what is free is free
        if self.bench is None or (memory and memory[0] > memory[2]):
            return None
        return self.attempt("memory", lambda: measure(self.bench, self.cfg.compile, self.metrics))

    @cached_property
    def plan(self) -> Plan | None:
        """How long the run takes, if it was measured."""
        if self.speed is None:
            return None
        calls = None
        if not self.cfg.guidance.get("weak_run"):  # a second network
            calls = profiling.sampling_calls(self.cfg, self.shape_and_classes)
        return plan(self.cfg, self.parts, self.data, self.layout, self.speed, calls)

    @property
    def steps(self) -> int:
        """Optimiser steps that the run will take, its time limit considered where it is known."""
        _ = self.layout  # which says what is no number
        try:
            return self.plan.steps if self.plan else self.cfg.trainer.max_steps
        except Unavailable:
            return self.cfg.trainer.max_steps

    @property
    def images_seen(self) -> int:
        """Training images in the whole run."""
        return self.steps * self.cfg.batch_size

    @property
    def epochs(self) -> float:
        """Passes over the images trained on."""
        return self.images_seen / len(self.data.train_images())


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
