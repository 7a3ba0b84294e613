"""What is said and kept of a run that has ended."""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.common.progress import say
from diffusion_lab.metrics import report
from diffusion_lab.runs.environment import environment_of
from diffusion_lab.runs.folder import SUMMARY
from diffusion_lab.training.callbacks.interruption import interrupted
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.task import Task


def summarise(
    cfg: DictConfig,
    parts: Task,
    trainer: lightning.Trainer,
    callbacks: dict[str, Callback],
    clock: Clock,
    peak_memory: int | None,
    device: torch.device,
) -> dict[str, object]:
    """What is worth knowing of a run at a glance."""
    return {
        "name": cfg.name,
        "finished": not interrupted(trainer),
        "pruned": "pruning" in callbacks and callbacks["pruning"].pruned,
        "steps": trainer.global_step,
        "images_seen": parts.module.images_seen,
        "skipped_steps": callbacks["non_finite"].skipped if "non_finite" in callbacks else 0,
        "wall_seconds": round(clock.seconds() + clock.left_out, 1),
        "training_seconds": round(clock.seconds(), 1),
        "parameters": sum(p.numel() for p in parts.network.parameters()),
        "precision": trainer.precision,
        "ranks": trainer.world_size,
        "training_images": len(parts.datamodule.train_images()),
        "metrics": figures_of(parts, callbacks),
        "protocol": parts.prepared.protocol if measured(callbacks) else None,
        "extra_quantities": parts.metrics.extra_facts if measured(callbacks) else [],
        "macs": None if interrupted(trainer) else parts.macs(cfg),
        "peak_memory_bytes": peak_memory,
        **environment_of(device),
    }


def measured(callbacks: dict[str, Callback]) -> dict[str, float]:
    """The figures of the generated images, empty if they were not taken."""
    return callbacks["evaluation"].results if "evaluation" in callbacks else {}


def figures_of(parts: Task, callbacks: dict[str, Callback]) -> dict[str, float]:
    """What the final weights were measured to be."""
    results = measured(callbacks)
    return (parts.with_ceiling(results) if results else {}) | parts.module.held_out_figures


def say_result(folder: Path, callbacks: dict[str, Callback], parts: Task) -> None:
    """The lines that a person waits for."""
    if results := measured(callbacks):
        extra = parts.metrics.extra_quantities
        for line in report(parts.with_ceiling(results), parts.datamodule.class_names, extra):
            say(line)
    if grid := callbacks.get("sample_grid"):
        say(f"Samples: {grid.latest}")
    say(f"Summary: {folder / SUMMARY}")
