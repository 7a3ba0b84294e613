"""A planned run in numbers."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from diffusion_lab.training.doctor.finding import Missing
from diffusion_lab.training.doctor.planned_run import PlannedRun
from diffusion_lab.training.logger.reachability import why_offline

Facts = dict[str, Any]


def wandb(run: PlannedRun) -> str:
    """Where W&B's record goes."""
    if not run.cfg.logger:
        return "none"
    reason = why_offline(run.cfg.logger.mode)
    return f"offline, {reason}" if reason else "online"


FACTS: dict[str, Callable[[PlannedRun], object]] = {
    "data": lambda run: run.cfg.data.source._target_.rpartition(".")[2],
    "image_shape": lambda run: list(run.data.image_shape),
    "training_images": lambda run: len(run.data.train_images()),
    "test_images": lambda run: len(run.data.test_images()),
    "classes": lambda run: run.data.num_classes,
    "mean": lambda run: run.sample.float().mean().item() / 127.5 - 1,
    "std": lambda run: run.sample.float().std().item() / 127.5,
    "parameters": lambda run: run.cost.params,
    "macs": lambda run: run.cost.macs,
    "batch": lambda run: str(run.batch),
    "batch_size": lambda run: run.batch.batch_size,
    "steps": lambda run: run.steps,
    "max_steps": lambda run: run.cfg.trainer.max_steps,
    "images_seen": lambda run: run.images_seen,
    "epochs": lambda run: run.images_seen / len(run.data.train_images()),
    "device": lambda run: (
        torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    ),
    "precision": lambda run: run.precision,
    "wandb": wandb,
    "training_seconds": lambda run: run.plan.training,
    "drawing_seconds": lambda run: run.plan.drawing,
    "features_seconds": lambda run: run.plan.features,
    "memory_bytes": lambda run: run.memory.needed,
    "free_memory_bytes": lambda run: run.memory.free,
}


def facts_of(run: PlannedRun) -> Facts:
    """The facts that can be had."""
    facts: Facts = {}
    for name, fact in FACTS.items():
        with suppress(Missing):
            facts[name] = fact(run)
    return facts
