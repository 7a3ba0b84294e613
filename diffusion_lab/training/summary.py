"""The summary of a run that has ended, with the machine and versions, and its last lines."""

import platform
import shlex
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.assembly.instantiate import is_own
from diffusion_lab.common.messages import say
from diffusion_lab.compute.device import cpu_info, float32_precision
from diffusion_lab.metrics.quantity import report
from diffusion_lab.runs import averages, checkpoints
from diffusion_lab.runs.files import DIRTY, SUMMARY
from diffusion_lab.runs.results import Sampling, sampling_of
from diffusion_lab.runs.summary import Summary, load_summary
from diffusion_lab.training.callbacks import SampleEvaluation
from diffusion_lab.training.module import ENDLESS, RunContext
from diffusion_lab.training.task import Task
from diffusion_lab.training.trainer import TimeLimit


def summarise(
    cfg: DictConfig, task: Task, trainer: lightning.Trainer, finished: bool, peak_memory: int | None
) -> Summary:
    """The facts about a run that matter at a glance."""
    context = task.module.context
    clock, prepared = context.clock, context.prepared_metrics if context.results else None
    facts: dict[str, Any] = {
        "name": cfg.name,
        "finished": finished,
        "ended_by": ended_by(task, trainer) if finished else None,
        "steps": trainer.global_step,
        "images_seen": task.module.images_seen,
        "began_from_images": cfg.get("init_images"),
        "began_from_flops": cfg.get("init_flops"),
        "first_stage_seconds": first_stage_seconds(cfg, context.folder),
        "wall_seconds": round(clock.seconds() + clock.left_out, 1),
        "training_seconds": round(clock.seconds(), 1),
        "parameters": sum(p.numel() for p in task.module.network.parameters()),
        "precision": trainer.precision,
        **float32_precision(),
        "ranks": trainer.world_size,
        "training_images": len(task.datamodule.train_labels()),
        "validation_images": len(task.datamodule.validation_labels()),
        "metrics": metrics_of(task),
        "protocol": prepared.protocol if prepared else None,
        "sampling": sampling_of_metrics(cfg, context.measured_by),
        "at_other_steps": at_other_steps(cfg, context),
        "extra_quantities": prepared.metrics.extra_facts if prepared else [],
        "peak_memory_bytes": peak_memory,
        **task.costs(),
        **(task.counts(cfg) if finished else {}),
        **environment_of(trainer.strategy.root_device),
        "overrides": overrides_of(context.folder),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Summary(**(facts | context.summary))


def first_stage_seconds(cfg: DictConfig, folder: Path) -> float | None:
    """The training seconds of the first stage's run; None if there is none or it is not known."""
    if (stage := OmegaConf.select(cfg, "first_stage.run")) is None:
        return None
    if (known := cfg.get("first_stage_seconds")) is not None:  # since the run began
        return known
    if Path(stage) == folder:  # a resumed run uses its own copy
        return load_summary(folder).first_stage_seconds
    return load_summary(averages.run_of(Path(stage))).training_seconds


def overrides_of(folder: Path) -> list[str] | None:
    """The overrides of the command that began a run; None if only those of a resume are known."""
    if earlier := load_summary(folder).overrides:  # of a run that was stopped
        return earlier
    if not HydraConfig.initialized():
        return None
    given = list(HydraConfig.get().overrides.task)
    return None if any(each.startswith("resume=") for each in given) else given


def sampling_of_metrics(cfg: DictConfig, measured_by: Callback | None) -> Sampling | None:
    """The settings by which measured samples were drawn; None if no samples were measured."""
    if not isinstance(measured_by, SampleEvaluation):
        return None
    return sampling_of(cfg) | {"seed": measured_by.seed}


def at_other_steps(cfg: DictConfig, context: RunContext) -> list[dict[str, object]]:
    """The sampling and the metrics of samples that were drawn in other numbers of steps."""
    records = []
    for steps, metrics in context.at_other_steps.items():
        sampling: Any = sampling_of_metrics(cfg, context.measured_by)
        sampling["sampler"]["steps"] = steps
        records.append({"sampling": sampling, "metrics": metrics})
    return records


def metrics_of(task: Task) -> dict[str, float]:
    """The metrics of the final weights, including the losses of validation and test images."""
    module = task.module
    results = task.with_ceiling(module.context.results) if module.context.results else {}
    return results | module.validation_metrics | module.test_metrics


def ended_by(task: Task, trainer: lightning.Trainer) -> str | None:
    """The callbacks from outside the package, one of which ended training early; None if none did.

    Pruning and the time limit are not counted, as they have records of their own.
    """
    limits = [each for each in trainer.callbacks if isinstance(each, TimeLimit)]  # type: ignore[attr-defined]
    timed_out = any((each.time_remaining() or 0) <= 0 for each in limits)
    expected = timed_out or task.module.context.summary.get("pruned")
    if expected or not trainer.should_stop or trainer.global_step >= trainer.max_steps:
        return None
    others = [each for each in task.callbacks if is_own(each)]
    told = [each for each in others if getattr(each, "stopping_reason_message", None)]
    return " or ".join(type(each).__name__ for each in told or others) or "the module"


def say_result(task: Task, trainer: lightning.Trainer) -> None:
    """Prints the metrics, and where the latest samples and the summary are."""
    context = task.module.context
    if ended := ended_by(task, trainer):
        end = f" of {trainer.max_steps:,}" if trainer.max_steps < ENDLESS else ""
        say(f"{ended} ended training early, at step {trainer.global_step:,}{end}.")
    if context.results and context.prepared_metrics:
        results, measured = task.with_ceiling(context.results), context.prepared_metrics.metrics
        for line in report(results, task.datamodule.class_names, measured.extra_quantities):
            say(line)
    for steps, metrics in context.at_other_steps.items():
        say(f"In {steps} steps: {report(metrics)[1]}")
    if context.latest_grid:
        say(f"Samples: {context.latest_grid}")
    say(f"Summary: {context.folder / SUMMARY}")
    if task.pipeline is not None and checkpoints.exists(context.folder):
        folder = shlex.quote(str(context.folder))
        say(f"Next: diffusion-lab sample run={folder}")
        say(f"      diffusion-lab compare {folder} OTHER_RUN")


def environment_of(device: torch.device) -> dict[str, object]:
    """The device, the versions and the commit that results depend on."""
    names = ("torch", "torchvision", "lightning", "hydra-core", "wandb")
    processor = cpu_info("model name") or platform.processor()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {processor}"
    return {
        "device": name,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"diffusion-lab": diffusion_lab.__version__}
        | {each: version(each) for each in names},
        "git_commit": git_commit(),
    }


@cache
def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, or None if it is installed.

    It is that of the first call in this process: commits during a training change nothing that was
    imported. It ends in DIRTY if the checkout has uncommitted changes.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", f"--dirty={DIRTY}", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
