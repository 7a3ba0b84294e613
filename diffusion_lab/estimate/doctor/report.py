"""The findings and facts of a run as they are printed, the worst first."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.markup import escape

from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import console, say
from diffusion_lab.estimate.run_cost import snapshot_bytes
from diffusion_lab.training.logger.run_logger import why_offline

COLOURS = {"error": "bold red", "warning": "yellow", "advice": "cyan"}
NOUNS = {"error": "error{}", "warning": "warning{}", "advice": "piece{} of advice"}


Remark = tuple[str, str]  # a status and a sentence; a check without one has found nothing wrong
Facts = dict[str, Any]


class Finding(NamedTuple):
    """The result of a check: its name, a status, and a message that says what to write instead."""

    name: str
    status: str  # of a remark, or ok or skipped
    message: str = ""


def advice(message: str) -> Remark:
    """Makes a remark on something that could be better."""
    return "advice", message


def warning(message: str) -> Remark:
    """Makes a remark on something that spoils results."""
    return "warning", message


def error(message: str) -> Remark:
    """Makes a remark on something that makes a run fail, or worthless."""
    return "error", message


def loggers(cfg: DictConfig) -> str:
    """Names the loggers of the run, and says whether W&B is online or offline, and why."""
    names = list(cfg.get("logger") or {})
    if "wandb" in names:
        reason = why_offline(cfg.logger.wandb.mode)
        names[names.index("wandb")] = f"wandb ({f'offline, {reason}' if reason else 'online'})"
    return ", ".join(names) or "none"


FACTS: dict[str, Callable[..., object]] = {
    "data": lambda cfg: cfg.data.source._target_.rpartition(".")[2],
    "image_shape": lambda data: list(data.image_shape),
    "training_images": lambda data: len(data.train_labels()),
    "validation_images": lambda data: len(data.validation_labels()),
    "test_images": lambda data: len(data.test_labels()),
    "classes": lambda data: data.num_classes,
    "mean": lambda sample: sample.float().mean().item() / 127.5 - 1,
    "std": lambda sample: sample.float().std().item() / 127.5,
    "parameters": lambda counts: counts.parameters,
    "macs": lambda counts: counts.macs,
    "batch": lambda layout: str(layout),
    "batch_size": lambda layout: layout.batch_size,
    "steps": lambda steps: steps,
    "max_steps": lambda cfg: cfg.trainer.max_steps,
    "images_seen": lambda seen: seen,
    "epochs": lambda data, seen: seen / len(data.train_labels()),
    "device": lambda device: torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    "precision": lambda precision: precision,
    "loggers": loggers,
    "training_seconds": lambda times: times.run.training + times.run.validation,
    "drawing_seconds": lambda times: times.run.sampling,
    "features_seconds": lambda times: times.features,
    "memory_bytes": lambda memory: memory.total,
    "free_memory_bytes": lambda memory, free: free,
    "snapshot_bytes": lambda task: snapshot_bytes(task),
}


def show(findings: list[Finding], facts: Facts) -> None:
    """Prints all facts, and the findings, the worst first, on standard error."""
    for line in lines_of(facts):
        say(line)
    for status, colour in COLOURS.items():
        for finding in findings:
            if finding.status == status:
                console.print(
                    f"[{colour}]{status:>7}[/]  {finding.name}: {escape(finding.message)}",
                    soft_wrap=True,  # keeps commands to paste on one line
                )
    for status, words in (("ok", "     ok  "), ("skipped", "not checked  ")):
        if names := [finding.name for finding in findings if finding.status == status]:
            say(words + ", ".join(names))
    counts = {status: sum(f.status == status for f in findings) for status in NOUNS}
    said = [f"{n} {NOUNS[status].format('s' * (n > 1))}" for status, n in counts.items() if n]
    say(", ".join(said) or "Nothing to change")


def lines_of(facts: Facts) -> Iterator[str]:
    """Formats the available facts as a few lines."""
    images = ""
    if "image_shape" in facts:
        shape = "x".join(map(str, facts["image_shape"]))
        images = (
            f", {facts['training_images']:,} training, {facts['validation_images']:,} validation "
            f"and {facts['test_images']:,} test images of {shape} in {facts['classes']} classes; "
            f"mean {facts['mean']:.2f}, standard deviation {facts['std']:.2f} in [-1, 1]"
        )
    yield f"Data: {facts['data']}{images}"
    if "parameters" in facts:
        disk = facts["snapshot_bytes"]
        yield (
            f"Model: {amount(facts['parameters'])} parameters, {amount(facts['macs'])} MACs per "
            "network call"
            + (f"; snapshots of its averages take {amount(disk)}B of disk" if disk else "")
        )
    if "epochs" in facts:
        yield f"Batch: {facts['batch']}"
        limited, passes = facts["steps"] < facts["max_steps"], facts["epochs"]
        limit = f" of {facts['max_steps']:,} (until trainer.max_time)," if limited else ","
        times = f"{passes:,.0f}" if passes >= 100 else f"{passes:.2g}"
        yield (
            f"Run: {'about ' if limited else ''}{facts['steps']:,} steps{limit} "
            f"{amount(facts['images_seen'])} images, each seen {times} times"
        )
    if "device" in facts:
        line = "Device: " + ", ".join(facts[n] for n in ("device", "precision") if n in facts)
        if "memory_bytes" in facts:
            needed, free = facts["memory_bytes"] / 1e9, facts["free_memory_bytes"] / 1e9
            line += f", about {needed:.2g} of {free:.2g} GB of memory"
        yield line
        yield f"Loggers: {facts['loggers']}"
    if "training_seconds" in facts:
        drawing = facts["drawing_seconds"]
        drawn = "an unknown time" if drawing is None else duration(drawing)
        yield (
            f"Estimated time: {duration(facts['training_seconds'])} for training, {drawn} for "
            f"sampling, {duration(facts['features_seconds'])} for features of the metrics"
        )
