"""A run in numbers, in groups; each takes results of the stages by their names."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.backbone.macs import Cost
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageDataModule
from diffusion_lab.training.doctor.estimates import Plan
from diffusion_lab.training.doctor.stages import Length, Memory
from diffusion_lab.training.logger.reachability import why_offline

Facts = dict[str, Any]


def source_facts(cfg: DictConfig) -> Facts:
    """The name of the data."""
    return {"data": cfg.data.source._target_.rpartition(".")[2]}


def data_facts(data: ImageDataModule, sample: Tensor) -> Facts:
    """Sizes and statistics of the data, which are read."""
    images = sample.float() / 127.5 - 1
    return {
        "image_shape": list(data.image_shape),
        "training_images": len(data.train_images()),
        "test_images": len(data.test_images()),
        "classes": data.num_classes,
        "mean": images.mean().item(),
        "std": images.std().item(),
    }


def model_facts(cost: Cost) -> Facts:
    """The size of the network."""
    return {"parameters": cost.params, "macs": cost.macs}


def run_facts(cfg: DictConfig, batch: BatchLayout, length: Length, data: ImageDataModule) -> Facts:
    """The length of the run."""
    return {
        "batch": str(batch),
        "batch_size": batch.batch_size,
        "steps": length.steps,
        "max_steps": cfg.trainer.max_steps,
        "images_seen": length.images_seen,
        "epochs": length.images_seen / len(data.train_images()),
    }


def device_facts(cfg: DictConfig, device: torch.device, precision: str) -> Facts:
    """The device, the precision, and where W&B's record goes."""
    reason = why_offline(cfg.logger.mode) if cfg.logger else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "wandb": "none" if not cfg.logger else f"offline, {reason}" if reason else "online",
    }


def time_facts(plan: Plan | None) -> Facts:
    """The seconds of the run, if they were measured."""
    if plan is None:
        return {}
    return {
        "training_seconds": plan.training,
        "drawing_seconds": plan.drawing,
        "features_seconds": plan.features,
    }


def memory_facts(memory: Memory | None) -> Facts:
    """The memory of a step, if it was measured."""
    if memory is None:
        return {}
    return {"memory_bytes": memory.needed, "free_memory_bytes": memory.free}


GROUPS = (source_facts, data_facts, model_facts, run_facts, device_facts, time_facts, memory_facts)
