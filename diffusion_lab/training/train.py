"""One training run, from a composed configuration to a folder with pictures and a summary."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffusion_lab import runs
from diffusion_lab.build.checks import advice
from diffusion_lab.build.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.build.objects import build_datamodule, build_model, build_pipeline
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.progress import say
from diffusion_lab.common.ranges import whole
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import PeakMemory, channels_last_pays, check_choices, compile_pays
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.first_stage import Pixels
from diffusion_lab.metrics import ceiling
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.profiling.costs import ImageFacts, cost_of
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.diffusion_run import load_weak
from diffusion_lab.runs.lock import locked, require_unlocked
from diffusion_lab.training.callbacks import EMA, Checkpoint, Throughput
from diffusion_lab.training.callbacks.interruption import (
    interrupted,
    interruption_of,
    requeue_wanted,
)
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.diffusion_module import DiffusionModule
from diffusion_lab.training.failures import explaining_failures, resume_command
from diffusion_lab.training.logger import JSONLines
from diffusion_lab.training.logger.reachability import MODES
from diffusion_lab.training.summary import figures_of, say_result, summarise
from diffusion_lab.training.task import Task, try_out, watchers
from diffusion_lab.training.trainer import build_trainer, housekeeping, quiet_lightning

ALLOWED = {
    "batch_size": whole(1),
    "seed": whole(0),
    "validate_every_n_steps": whole(1),
    "trainer.max_steps": whole(1),
    "trainer.log_every_n_steps": whole(1),
}
# of any callback that has such a key, which is asked for when hours have passed
CALLBACK_NUMBERS = {"every_n_steps": 1, "batch_size": 1, "columns": 1, "seed": 0}


@dataclass(frozen=True)
class DiffusionTask(Task):
    """Those of a diffusion model."""

    command: ClassVar[str] = "train"

    pipeline: Pipeline

    @property
    def network(self) -> nn.Module:
        return self.module.denoiser

    def compile(self) -> None:
        self.module.denoiser.backbone.compile()

    def advice(self) -> list[str]:
        return advice(
            self.pipeline.schedule,
            self.module.objective,
            self.pipeline.guidance,
            self.module.augmentation,
            self.datamodule.flip,
            latents=not isinstance(self.module.first_stage, Pixels),
        )

    def prepare(self, cfg: DictConfig, device: torch.device) -> None:
        self.module.first_stage.prepare(self.datamodule, device)
        OmegaConf.update(cfg, "first_stage", self.module.first_stage.facts())

    def with_ceiling(self, results: dict[str, float]) -> dict[str, float]:
        return results | ceiling(results, self.module.first_stage.figures(self.datamodule))

    def save_dependencies(self, folder: Path) -> None:
        self.module.first_stage.keep(folder)

    def macs(self, cfg: DictConfig) -> int | None:
        data = self.datamodule
        try:
            return cost_of(cfg, ImageFacts(data.image_shape, data.num_classes)).macs
        except Exception as error:  # of somebody's network: no reason to lose a trained run
            say(f"MACs could not be counted: {error}")
            return None

    def facts(self, folder: Path) -> dict[str, dict]:
        return {
            "checkpoint": {"folder": folder / checkpoints.FOLDER},
            "sample_grid": {"pipeline": self.pipeline, "folder": folder / runs.SAMPLES},
            "evaluation": {"pipeline": self.pipeline, "metrics": self.prepared},
            "pruning": {"folder": folder},
        }


def train(cfg: DictConfig, overrides: list[str], build: Callable[..., Task]) -> None:
    """Trains what `build` makes of a configuration, `build_diffusion_task` or what takes its place.

    Whatever can be refused is refused before anything is written. `overrides` are the command
    line's, for the processes of a run on several devices. Raises KeyboardInterrupt if the run was
    stopped, after saving it.
    """
    check_settings(cfg)
    devices, nodes = launch.processes(cfg.trainer)
    layout = solve_batch(cfg.batch_size, devices * nodes, cfg.micro_batch_size)
    if nodes > 1 and not launch.in_launched_process():
        raise UserError(
            f"trainer.num_nodes={nodes} needs processes on each node; start them by srun, by "
            "torchrun or with hydra/launcher=slurm"
        )
    if devices > 1 and not launch.in_launched_process():
        # what is wrong is said here, before any process is started
        parts = build(cfg, layout, device="meta")
        with errors_at(cfg, "data"):
            parts.datamodule.prepare_data()
        if parts.metrics is not None:
            with errors_at(cfg, "metrics"):
                parts.metrics.load(parts.datamodule, "cpu")
        if cfg.resume:
            require_unlocked(Path(cfg.resume))
        folder = cfg.resume or cfg.run_dir
        with explaining_failures(parts.command, Path(folder) if folder else None):
            launch.run_on_all_devices(parts.command, overrides, devices)
        return

    device = launch.device_of_process(cfg.trainer)
    launch.join_process_group(device)
    parts = build(cfg, layout)
    with errors_at(cfg, "data"):
        parts.datamodule.prepare_data()
        parts.datamodule.setup("fit")
        parts.datamodule.held_out(parts.datamodule.validation_size, "data.validation_size")
    parts.prepare(cfg, device)
    if parts.metrics is not None:
        with errors_at(cfg, "metrics"):
            parts.metrics.load(parts.datamodule, device)
            parts = replace(parts, prepared=parts.metrics.prepare(parts.datamodule))
    OmegaConf.update(cfg, "data.source", parts.datamodule.source.facts())
    if not (cfg.resume or cfg.run_dir) and (before := runs.unfinished(cfg.name)):
        say(f"{before} is not finished. To go on with it rather than begin anew, write:")
        say(f"  {resume_command(parts.command, before)}")
    folder = Path(cfg.resume) if cfg.resume else runs.create(cfg, parts.command, overrides)
    with locked(folder), explaining_failures(parts.command, folder):
        checkpoint = on_rank_zero(lambda: opened(cfg, parts, folder))
        runs.save_config(folder, cfg)
        say(f"Run folder: {folder}")
        say(f"Batch: {layout}")
        for line in parts.advice():
            say(f"Advice: {line}")
        run_training(cfg, parts, layout, folder, device, checkpoint)


def opened(cfg: DictConfig, parts: Task, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; a new run gets what its parts keep, and None."""
    if cfg.resume:
        # a job that is requeued may have been ended before its first checkpoint
        checkpoint = checkpoints.go_on_from(folder) if checkpoints.exists(folder) else None
        runs.reopen(folder)
        return checkpoint
    runs.check_new(cfg)  # again: another process may have been quicker
    parts.save_dependencies(folder)
    return None


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for a value that no part of the run checks itself."""
    of_callbacks = {
        f"callbacks.{name}.{key}": whole(least)
        for name, callback in cfg.callbacks.items()
        for key, least in CALLBACK_NUMBERS.items()
        # null: never
        if key in (callback or ()) and (key, callback[key]) != ("every_n_steps", None)
    }
    check_keys(cfg, ALLOWED | of_callbacks)
    check_choices(compile=cfg.compile, channels_last=cfg.channels_last)
    if cfg.logger and cfg.logger.mode not in MODES:
        raise UserError(f"logger.mode={cfg.logger.mode} is unknown; use {', '.join(MODES)}")
    if not cfg.resume:
        runs.check_new(cfg)


def build_diffusion_task(
    cfg: DictConfig, layout: BatchLayout, device: str = "cpu"
) -> DiffusionTask:
    """Builds what the configuration names; raises UserError for what cannot work."""
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    model = build_model(cfg, datamodule.image_shape, datamodule.num_classes, device)
    module = DiffusionModule(
        model.denoiser,
        model.objective,
        model.first_stage,
        instantiate(cfg, "optimizer"),
        instantiate(cfg, "lr_schedule"),
        cfg.batch_size,
        cfg.seed,
        model.augmentation,
    )
    try_out(cfg, layout, module)
    with errors_at(cfg, "data"):
        datamodule.set_batch(cfg.batch_size, layout.micro_batch, cfg.seed)
    metrics = instantiate(cfg, "metrics") if cfg.callbacks.get("evaluation") else None
    if metrics is not None:
        with errors_at(cfg, "metrics"):
            metrics.check(model.denoiser.conditioning.conditional, datamodule.num_classes)
    pipeline = build_pipeline(
        cfg, model, datamodule.num_classes, load_weak(cfg.guidance.get("weak_run"), cfg)
    )
    return DiffusionTask(datamodule, module, metrics, *watchers(cfg), pipeline)


def run_training(
    cfg: DictConfig,
    parts: Task,
    layout: BatchLayout,
    folder: Path,
    device: torch.device,
    checkpoint: Path | None,
) -> None:
    """Fits, from a checkpoint if there is one, evaluates and writes the summary."""
    clock = Clock(cfg.batch_size)
    rows = JSONLines(folder / runs.METRICS, clock)
    if checkpoint is None:
        rows.truncate(0)  # a job that died before its first checkpoint may have left some
    wandb = None
    if parts.logger:
        # the id is younger than the parts: a new run's is made with its folder
        known = {"run_id": cfg.logger.run_id, "config": plain(cfg)}
        known["choices"] = known["config"]["logger"].get("choices")
        wandb = parts.logger(run_dir=folder, clock=clock, **known)
    memory = PeakMemory(device)
    callbacks = finish_callbacks(parts, folder, clock, memory)
    module = parts.module
    if channels_last_pays(cfg.channels_last, device):
        module.to(memory_format=torch.channels_last)
    if compile_pays(cfg.compile, device):
        parts.compile()
    summary = None
    try:
        if wandb:
            with clock.stopped():  # reaching its server takes its time
                say(wandb.start() or "")
        with quiet_lightning():
            trainer = build_trainer(
                cfg,
                layout,
                device,
                logger=[rows, wandb] if wandb else [rows],
                callbacks=[*callbacks.values(), *housekeeping(rows)],
                default_root_dir=folder,
            )
            trainer.fit(
                module, datamodule=parts.datamodule, ckpt_path=checkpoint, weights_only=True
            )
            peak = memory.bytes()  # before the final figures, which are no training
            if not interrupted(trainer):
                finish_run(trainer, parts, callbacks, folder, device)
        if trainer.is_global_zero:
            summary = summarise(cfg, parts, trainer, callbacks, clock, peak, device)
            runs.write_summary(folder, summary)
    finally:
        if wandb:
            wandb.finish(summary)
    if interrupted(trainer):
        say(f"Stopped at step {trainer.global_step}; nothing is lost.")
        if requeue_wanted(trainer):
            launch.leave_and_requeue()
        say("Go on with:")
        say(f"  {resume_command(parts.command, folder)}")
        raise KeyboardInterrupt
    say_result(folder, callbacks, parts)


def finish_run(
    trainer: lightning.Trainer,
    parts: Task,
    callbacks: dict[str, Callback],
    folder: Path,
    device: torch.device,
) -> None:
    """The held-out loss, the grid and the figures of the final weights, and what the parts leave.

    After `fit` and not in it, so that a run that was killed or stopped here is finished when it is
    resumed.
    """
    try:
        with interruption_of(trainer).at_once():
            if parts.module.validated_step != trainer.global_step:
                trainer.validate(parts.module, datamodule=parts.datamodule, verbose=False)
            parts.module.to(device)  # Lightning has moved it away
            for name in ("sample_grid", "evaluation"):
                if name in callbacks:
                    callbacks[name].timed_run(trainer)
            if trainer.is_global_zero:
                parts.finish(folder, figures_of(parts, callbacks), device)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the one of the other
        if not interrupted(trainer):
            raise


def finish_callbacks(
    parts: Task, folder: Path, clock: Clock, memory: PeakMemory
) -> dict[str, Callback]:
    """The configured callbacks with the facts of a run, in the order in which they must come."""
    facts = parts.facts(folder)
    callbacks = {
        name: part(**facts[name]) if name in facts else part
        for name, part in parts.callbacks.items()
    }
    for callback in callbacks.values():
        if isinstance(callback, Periodic):
            callback.meters = (clock, memory)
        if isinstance(callback, Throughput):
            callback.clock = clock
    # a checkpoint, grid or figure of a step must have the average of that step
    first = sorted(callbacks.items(), key=lambda item: not isinstance(item[1], EMA))
    # and what a step leaves must be there before a checkpoint says that it was made
    return dict(sorted(first, key=lambda item: isinstance(item[1], Checkpoint)))


def plain(cfg: DictConfig) -> dict:
    """The configuration as nested dictionaries, resolved."""
    return OmegaConf.to_container(cfg, resolve=True)
