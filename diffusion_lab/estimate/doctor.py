"""Checks a training run before it starts: what is wrong, and what could be better.

The parts of the run are made in order, each by a function of parts before it, which are its
arguments by name. Checks and facts are functions of parts, too; those that lack one are left out.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from diffusion_lab.assembly.costs import ImageFacts, Memory, RunCost, calls_of_one_network, counted
from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.objects import build_images, load_data
from diffusion_lab.assembly.sentences import MISTAKES, sentence
from diffusion_lab.common import rules
from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import float32_products, pays, pick_precision
from diffusion_lab.compute.sharding import sharded, strategy_options
from diffusion_lab.data import ImageData
from diffusion_lab.data.source import decoding
from diffusion_lab.estimate import budget, run_cost
from diffusion_lab.estimate.checks_of_resources import OF_IMAGES, OF_MACHINE
from diffusion_lab.estimate.checks_of_settings import OF_SETTINGS
from diffusion_lab.estimate.profile import Bench, median_seconds
from diffusion_lab.families.diffusion.task import DiffusionTask, build_task
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.logger.run_logger import why_offline
from diffusion_lab.training.study import check_protocol
from diffusion_lab.training.train import check_settings
from diffusion_lab.training.trainer import check_trainer

SAMPLE = 1000  # images, enough to know a standard deviation to about 1 %
TIMED_STEPS = 3
LARGE_STEP = 10**11  # multiply-accumulates of a forward pass, some seconds of a CPU's step
FEATURE_IMAGES = 64  # batch of the feature extractor, as in the metrics
CHECKS = (*OF_IMAGES, *OF_SETTINGS, *OF_MACHINE)
UNMEASURED = "not measured: speed=false, a precision for training only, or too little memory"
TOO_LARGE = (
    "a training step does not fit into the device's memory; write a smaller micro_batch_size, or "
    "wait until the device is free"
)
COLOURS = {"error": "bold red", "warning": "yellow", "advice": "cyan"}
NOUNS = {"error": "error{}", "warning": "warning{}", "advice": "piece{} of advice"}


class Finding(NamedTuple):
    """The result of a check: its name, a status, and a message that says what to write instead."""

    name: str
    status: str  # error, warning, advice, ok or skipped
    message: str = ""


class Unknown(Exception):
    """Raised for a part that is not measured, or that the system does not tell."""


def doctor(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints what is wrong with a training run; returns the checks and the facts."""
    if cfg.resume:
        raise UserError("doctor looks at a run before it is made; leave out resume=...")
    findings, facts = diagnose(budget.with_budget(cfg, overrides))
    show(findings, facts)
    busy, cores = getattr(os, "getloadavg", lambda: (0.0,))()[0], os.cpu_count() or 1
    if facts.get("device") == "cpu" and busy > cores:
        say(f"Now {busy:.0f} processes want {cores} cores: runs take longer, or see fewer images")
    return {"checks": [finding._asdict() for finding in findings], "facts": facts}


def diagnose(cfg: DictConfig) -> tuple[list[Finding], dict[str, Any]]:
    """Returns the findings on a training run, at least one per check, and its facts."""
    made: dict[str, Any] = {"cfg": cfg}
    errors, checked, unknown = [], [], set[str]()  # unknown: missing parts that were not refused
    for name, error, make in PARTS:
        if absent := needs(make) - made.keys():
            unknown |= {name} if absent & unknown else set()
            continue
        try:
            with errors_at(cfg, ""), rules.collected() as broken:
                made[name] = make(**taken(make, made))
            reasons = list(dict.fromkeys(broken))
        except Unknown:
            reasons = []
            unknown.add(name)
        except torch.OutOfMemoryError:
            reasons = [TOO_LARGE]
        except MISTAKES as refusal:
            reasons = [sentence(refusal)]
        if reasons:
            made.pop(name, None)
        errors += [Finding(error, "error", reason) for reason in reasons]
    wrong = {each.name for each in errors}
    for check in CHECKS:
        name, absent = check.__name__, needs(check) - made.keys()
        if not absent:
            said = [Finding(name, *remark) for remark in check(**taken(check, made))]
            checked += said or [Finding(name, "ok")]
        elif name not in wrong:  # else it is reported already
            checked.append(Finding(name, "skipped", UNMEASURED if absent & unknown else ""))
    known = {name: fact for name, fact in FACTS.items() if needs(fact) <= made.keys()}
    return errors + checked, {name: fact(**taken(fact, made)) for name, fact in known.items()}


def needs(step: Callable[..., Any]) -> set[str]:
    """The names of the parts that a step takes and cannot do without."""
    parameters = inspect.signature(step).parameters.values()
    return {each.name for each in parameters if each.default is each.empty}


def taken(step: Callable[..., Any], made: dict[str, Any]) -> dict[str, Any]:
    """The parts that a step takes, as far as they are made."""
    return {name: made[name] for name in inspect.signature(step).parameters if name in made}


def settings_of(cfg: DictConfig) -> DictConfig:
    """The configuration, once its numbers are checked."""
    check_settings(cfg)
    check_protocol(cfg)
    return cfg


def layout_of(settings: DictConfig) -> BatchLayout:
    """The layout of the batch over the devices of the run."""
    world = math.prod(launch.processes(settings.trainer))
    return solve_batch(settings.batch_size, world, settings.micro_batch_size)


def loaded(cfg: DictConfig, datamodule: ImageData) -> ImageData:
    """The data module, after it has read the data and its splits are checked."""
    load_data(cfg, datamodule)
    return datamodule


def trainable(cfg: DictConfig, layout: BatchLayout) -> BatchLayout:
    """The layout of the batch, once a trainer could be built for it."""
    check_trainer(cfg, layout)
    return layout


def built(cfg: DictConfig, trainable: BatchLayout, facts: ImageFacts) -> DiffusionTask:
    """Everything that is built for images of these facts, with the network on device "meta"."""
    task = build_task(cfg, device="meta")
    task.check_callbacks(trainable, cfg.trainer)
    return task


def loaded_metrics(
    cfg: DictConfig, task: DiffusionTask, device: torch.device
) -> GenerativeMetrics | None:
    """The metrics with their networks loaded; None if nothing is evaluated."""
    if task.metrics is not None:
        with errors_at(cfg, "metrics"):
            task.metrics.load(task.datamodule, device)
    return task.metrics


def free_on(device: torch.device) -> int:
    """The device's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = decoding.free_memory()
    if free is None:
        raise Unknown
    return free


def memory(
    cfg: DictConfig, task: DiffusionTask, facts: ImageFacts, layout: BatchLayout, precision: str
) -> Memory:
    """The memory of a training step."""
    held = run_cost.activations(cfg, facts, precision).of(layout.micro_batch)
    try:
        return run_cost.memory_of(task, held, layout.world, sharded(cfg.trainer))
    except UserError as error:  # an optimiser whose state cannot be counted without its numbers
        raise Unknown from error


def steps_of(settings: DictConfig, run: run_cost.Duration | None = None) -> int:
    """The steps of a run: those that its time allows, or of a run that is not timed the most."""
    if run is None and settings.trainer.max_steps == budget.ENDLESS:
        raise Unknown
    return run.steps if run else settings.trainer.max_steps


def timed(
    cfg: DictConfig,
    task: DiffusionTask,
    facts: ImageFacts,
    layout: BatchLayout,
    device: torch.device,
    precision: str,
    counts: RunCost,
    data: ImageData,
    metrics: GenerativeMetrics | None,
    memory: Memory | None = None,
    free: int | None = None,
) -> tuple[RunCost, float]:
    """The cost of the run with its times, and the seconds of an image's features.

    Calls and features are divided over devices. On a CPU a large network takes fewer images.
    """
    too_large = memory and free and memory.total > free
    if not cfg.speed or precision not in ("32-true", "bf16-mixed") or too_large:
        raise Unknown
    micro, cfg = layout.micro_batch, cfg.copy()
    if device.type == "cpu":
        micro = max(1, min(micro, LARGE_STEP // max(1, counts.macs)))
    cfg.batch_size = micro
    say(f"Timing a step of {micro:,} images; speed=false leaves that out")
    bench = Bench(cfg, facts, device, precision)
    teacher = bench.model.objective.teacher
    if task.teacher and teacher and teacher.asked:
        task.teacher.answer(teacher, device)
    bench.compile(cfg.compile)
    works: list[Callable[[], object]] = [bench.train, bench.call]
    if metrics is not None:
        images = bench.images[torch.arange(FEATURE_IMAGES, device=device) % micro]
        works.append(partial(metrics.observer, images))
    with float32_products(cfg.get("matmul_precision")):
        step, call, *features = median_seconds(works, TIMED_STEPS)
    step, call = layout.batch_size / layout.world * step / micro, call / micro / layout.world
    cost = replace(counts, memory=memory, step=step, call=call)
    return cost, sum(features) / FEATURE_IMAGES / layout.world


def features_seconds(
    task: DiffusionTask, data: ImageData, run: run_cost.Duration, timed: tuple[RunCost, float]
) -> float:
    """The seconds of all features, with those that runs share."""
    images, metrics = task.measured_images(run.steps), task.metrics
    if metrics:
        images += len(metrics.reference_ids(data)) + len(metrics.test_ids(data))
    return images * timed[1]


# the name of a part, that of the error if it cannot be made, and the function that makes it
PARTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("settings", "settings", settings_of),
    ("layout", "batch", layout_of),
    ("device", "device", lambda cfg: launch.device_of_process(cfg.trainer)),
    (
        "precision",
        "device",
        lambda settings, device: pick_precision(settings.trainer.precision, device),
    ),
    ("datamodule", "data", build_images),
    ("facts", "data", lambda datamodule: ImageFacts(datamodule.image_shape, datamodule.labels)),
    ("data", "data", loaded),
    ("sample", "data", lambda data: data.trained_on(SAMPLE).images),
    ("trainable", "trainer", trainable),
    ("task", "composition", built),
    ("selected", "validation", lambda cfg, task, data: task.check_validation(cfg, data)),
    ("clean", "composition", lambda task, sample: task.module.first_stage.encode(sample)),
    ("metrics", "extractor", loaded_metrics),
    (
        "counts",
        "composition",
        lambda cfg, task, facts: counted(cfg, facts, calls_of_one_network(cfg, facts)),
    ),
    ("free", "memory", free_on),  # beside the networks of the metrics
    ("memory", "memory", memory),
    ("timed", "memory", timed),
    (
        "run",
        "memory",
        lambda cfg, task, data, timed: run_cost.duration_of(
            cfg, task, timed[0], len(data.validated_on().labels)
        ),
    ),
    ("features", "memory", features_seconds),
    ("steps", "time", steps_of),
    ("seen", "time", lambda steps, layout: steps * layout.batch_size),
)


def options(cfg: DictConfig, device: torch.device, layout: BatchLayout) -> str:
    """Names the options of speed and memory that are on."""
    on = [key for key in ("compile", "channels_last") if pays(cfg[key], device)]
    if device.type == "cuda" and cfg.trainer.get("benchmark") and not cfg.trainer.deterministic:
        on.append("trainer.benchmark")
    on += ["activation_checkpointing"] if cfg.activation_checkpointing else []
    if layout.world > 1:
        on += strategy_options(cfg.trainer)
    if OmegaConf.select(cfg, "callbacks.checkpoint.sharded"):
        on.append("callbacks.checkpoint.sharded")
    return ", ".join(on) or "none"


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
    "options": options,
    "loggers": loggers,
    "training_seconds": lambda run: run.training + run.validation,
    "drawing_seconds": lambda run: run.sampling,
    "features_seconds": lambda features: features,
    "memory_bytes": lambda memory: memory.total,
    "free_memory_bytes": lambda memory, free: free,
    "snapshot_bytes": lambda task: run_cost.snapshot_bytes(task),
}


def show(findings: list[Finding], facts: dict[str, Any]) -> None:
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


def lines_of(facts: dict[str, Any]) -> Iterator[str]:
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
        if "options" in facts:
            yield f"Options that are on: {facts['options']}"
        yield f"Loggers: {facts['loggers']}"
    if "training_seconds" in facts:
        drawing = facts["drawing_seconds"]
        drawn = "an unknown time" if drawing is None else duration(drawing)
        yield (
            f"Estimated time: {duration(facts['training_seconds'])} for training, {drawn} for "
            f"sampling, {duration(facts['features_seconds'])} for features of the metrics"
        )
