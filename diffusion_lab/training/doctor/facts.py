"""What a run is in figures, as far as it can be had."""

import torch

from diffusion_lab.training.doctor.case import Case, Unavailable
from diffusion_lab.training.logger.reachability import why_offline

Facts = dict[str, object]


def facts_of(case: Case) -> Facts:
    """Figures by name; a group that needs what was refused is left out."""
    facts: Facts = {"data": case.cfg.data.source._target_.rpartition(".")[2]}
    for group in (_data, _model, _run, _device, _time, _memory):
        try:
            facts |= group(case)
        except Unavailable:
            continue
    return facts


def _data(case: Case) -> Facts:
    data, images = case.data, case.sample.float() / 127.5 - 1
    return {
        "image_shape": list(data.image_shape),
        "training_images": len(data.train_images()),
        "test_images": len(data.test_images()),
        "classes": data.num_classes,
        "mean": images.mean().item(),
        "std": images.std().item(),
    }


def _model(case: Case) -> Facts:
    return {"parameters": case.cost.params, "macs": case.cost.macs}


def _run(case: Case) -> Facts:
    return {
        "batch": str(case.layout),
        "batch_size": case.layout.batch_size,
        "steps": case.steps,
        "max_steps": case.cfg.trainer.max_steps,
        "images_seen": case.images_seen,
        "epochs": case.epochs,
    }


def _device(case: Case) -> Facts:
    gpu = case.device.type == "cuda"
    logger = case.cfg.logger
    reason = why_offline(logger.mode) if logger else None
    return {
        "device": torch.cuda.get_device_name(case.device) if gpu else "cpu",
        "precision": case.precision,
        "wandb": "none" if not logger else f"offline, {reason}" if reason else "online",
    }


def _time(case: Case) -> Facts:
    plan = case.plan
    if plan is None:
        return {}
    return {
        "training_seconds": plan.training,
        "drawing_seconds": plan.drawing,
        "features_seconds": plan.features,
    }


def _memory(case: Case) -> Facts:
    if case.memory is None:
        return {}
    needed, _, free = case.memory
    return {"memory_bytes": needed, "free_memory_bytes": free}
