"""Prints a diagnosis: the run in numbers, then what to change, the worst first."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from rich.markup import escape

from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import console, say
from diffusion_lab.training.doctor.finding import Finding, Missing, Status
from diffusion_lab.training.doctor.planned_run import PlannedRun
from diffusion_lab.training.logger.reachability import why_offline
from diffusion_lab.training.planning.disk import snapshot_bytes

Facts = dict[str, Any]
COLOURS = {Status.ERROR: "bold red", Status.WARNING: "yellow", Status.ADVICE: "cyan"}
NOUNS = {"error": "error{}", "warning": "warning{}", "advice": "piece{} of advice"}


def loggers(run: PlannedRun) -> str:
    """Names the loggers of the run, and says whether W&B is online or offline, and why."""
    names = list(run.cfg.get("logger") or {})
    if "wandb" in names:
        reason = why_offline(run.cfg.logger.wandb.mode)
        names[names.index("wandb")] = f"wandb ({f'offline, {reason}' if reason else 'online'})"
    return ", ".join(names) or "none"


FACTS: dict[str, Callable[[PlannedRun], object]] = {
    "data": lambda run: run.cfg.data.source._target_.rpartition(".")[2],
    "image_shape": lambda run: list(run.data.image_shape),
    "training_images": lambda run: len(run.data.train_labels()),
    "validation_images": lambda run: len(run.data.validation_labels()),
    "test_images": lambda run: len(run.data.test_labels()),
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
    "epochs": lambda run: run.images_seen / len(run.data.train_labels()),
    "device": lambda run: (
        torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    ),
    "precision": lambda run: run.precision,
    "loggers": loggers,
    "training_seconds": lambda run: run.plan.training,
    "drawing_seconds": lambda run: run.plan.drawing,
    "features_seconds": lambda run: run.plan.features,
    "memory_bytes": lambda run: run.memory.needed,
    "free_memory_bytes": lambda run: run.memory.free,
    "snapshot_bytes": lambda run: snapshot_bytes(run.task),
}


def facts_of(run: PlannedRun) -> Facts:
    """Returns the facts of a run that are available."""
    facts: Facts = {}
    for name, fact in FACTS.items():
        with suppress(Missing):
            facts[name] = fact(run)
    return facts


def show(findings: list[Finding], facts: Facts) -> None:
    """Prints all facts and findings on standard error."""
    for line in lines_of(facts):
        say(line)
    for status, colour in COLOURS.items():
        for finding in findings:
            if finding.status == status:
                console.print(
                    f"[{colour}]{status:>7}[/]  {finding.name}: {escape(finding.message)}",
                    soft_wrap=True,  # keeps commands to paste on one line
                )
    for status, words in ((Status.OK, "     ok  "), (Status.SKIPPED, "not checked  ")):
        if names := [finding.name for finding in findings if finding.status == status]:
            say(words + ", ".join(names))
    counts = {status: sum(f.status == status for f in findings) for status in NOUNS}
    said = [f"{n} {NOUNS[status].format('s' * (n > 1))}" for status, n in counts.items() if n]
    say(", ".join(said) or "Nothing to change")


def lines_of(facts: Facts) -> list[str]:
    """Formats the available facts as a few lines."""
    lines = [f"Data: {facts['data']}"]
    if "image_shape" in facts:
        shape = "x".join(str(side) for side in facts["image_shape"])
        lines[0] += (
            f", {facts['training_images']:,} training, {facts['validation_images']:,} validation "
            f"and {facts['test_images']:,} test images of {shape} in {facts['classes']} classes; "
            f"mean {facts['mean']:.2f}, standard deviation {facts['std']:.2f} in [-1, 1]"
        )
    if "parameters" in facts:
        lines.append(
            f"Model: {amount(facts['parameters'])} parameters, {amount(facts['macs'])} MACs per "
            "network call"
        )
    if facts.get("snapshot_bytes"):
        lines[-1] += f"; snapshots of its averages take {amount(facts['snapshot_bytes'])}B of disk"
    if "epochs" in facts:
        limited = facts["steps"] < facts["max_steps"]
        limit = f" of {facts['max_steps']:,} (until trainer.max_time)," if limited else ","
        passes = facts["epochs"]
        passes = f"{passes:,.0f}" if passes >= 100 else f"{passes:.2g}"
        lines += [
            f"Batch: {facts['batch']}",
            f"Run: {'about ' if limited else ''}{facts['steps']:,} steps{limit} "
            f"{amount(facts['images_seen'])} images, each seen {passes} times",
        ]
    if "device" in facts:
        lines += ["Device: " + ", ".join(facts[n] for n in ("device", "precision") if n in facts)]
        if "memory_bytes" in facts:
            needed, free = facts["memory_bytes"] / 1e9, facts["free_memory_bytes"] / 1e9
            lines[-1] += f", about {needed:.2g} of {free:.2g} GB of memory"
        lines.append(f"Loggers: {facts['loggers']}")
    if "training_seconds" in facts:
        drawing = facts["drawing_seconds"]
        drawn = "an unknown time" if drawing is None else duration(drawing)
        lines.append(
            f"Estimated time: {duration(facts['training_seconds'])} for training, {drawn} for "
            f"sampling, {duration(facts['features_seconds'])} for features of the metrics"
        )
    return lines
