"""One training run, from a composed configuration to a folder with pictures and a summary."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import launch, runs
from diffusion_lab.batch import BatchLayout, solve_batch
from diffusion_lab.build import build_datamodule, build_model, build_pipeline
from diffusion_lab.callbacks import Interruption
from diffusion_lab.callbacks.checkpoint import AtomicCheckpointIO
from diffusion_lab.callbacks.interruption import interrupted
from diffusion_lab.callbacks.progress import progress_callback
from diffusion_lab.data import ImageDataModule
from diffusion_lab.device import compile_pays, pick_precision
from diffusion_lab.diffusion_module import DiffusionModule
from diffusion_lab.errors import UserError, as_user_error
from diffusion_lab.logger import Clock, JSONLines
from diffusion_lab.metrics import GenerativeMetrics, report
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.progress import console, say


@dataclass(frozen=True)
class Parts:
    """Everything that a run trains and measures with, built and checked, nothing written."""

    datamodule: ImageDataModule
    module: DiffusionModule
    pipeline: Pipeline
    metrics: GenerativeMetrics | None
    callbacks: dict  # instances, or factories that want the facts of a run folder


def train(cfg: DictConfig, overrides: list[str]) -> None:
    """Trains as configured. Whatever can be refused is refused before anything is written.

    `overrides` are the command line's, for the processes of a run on several devices.
    """
    accelerator = launch.accelerator_of(cfg.trainer)
    devices = launch.devices_per_node(cfg.trainer)
    layout = solve_batch(cfg.batch_size, devices * cfg.trainer.num_nodes, cfg.micro_batch_size)
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps} must be at least 1")
    if not cfg.resume:
        runs.check_new(cfg)
    if devices > 1 and not launch.in_launched_process():
        # what is wrong is said here, before any process is started
        parts = build_parts(cfg, layout, device="meta")
        with as_user_error():
            parts.datamodule.prepare_data()
            if parts.metrics is not None:
                parts.metrics.extractor.load("cpu")
        launch.run_on_all_devices("train", overrides, devices)
        return

    launch.join_process_group(accelerator)
    parts = build_parts(cfg, layout)
    with as_user_error():
        parts.datamodule.prepare_data()
        parts.datamodule.setup("fit")
        if parts.metrics is not None:
            parts.metrics.prepare(parts.datamodule, torch.device(accelerator))
    folder = Path(cfg.resume) if cfg.resume else runs.create(cfg)
    say(f"Run folder: {folder}")
    say(f"Batch: {layout}")
    run_training(cfg, parts, layout, folder, torch.device(accelerator))


def build_parts(cfg: DictConfig, layout: BatchLayout, device: str = "cpu") -> Parts:
    """Builds what the configuration names; raises UserError for what cannot work."""
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    model = build_model(cfg, datamodule.image_shape, datamodule.num_classes, device)
    with as_user_error():
        module = DiffusionModule(
            model.denoiser,
            model.objective,
            model.first_stage,
            instantiate(cfg.optimizer),
            instantiate(cfg.lr_schedule),
            cfg.batch_size,
            cfg.seed,
        )
        try:
            module.optimizer(module.denoiser.parameters())
        except TypeError as error:
            raise UserError(f"the values of optimizer do not fit: {error}") from error
        datamodule.set_batch(cfg.batch_size, layout.micro_batch, cfg.seed)
        return Parts(
            datamodule,
            module,
            build_pipeline(cfg, model, datamodule.num_classes),
            instantiate(cfg.metrics) if cfg.callbacks.get("evaluation") else None,
            {name: instantiate(part) for name, part in cfg.callbacks.items() if part},
        )


def run_training(
    cfg: DictConfig, parts: Parts, layout: BatchLayout, folder: Path, device: torch.device
) -> None:
    """Fits, evaluates and writes the summary."""
    clock = Clock(cfg.batch_size)
    loggers = [JSONLines(folder / runs.METRICS, clock)]
    wandb = None
    if cfg.logger:
        wandb = instantiate(cfg.logger)(run_dir=folder, clock=clock, config=plain(cfg))
        loggers.append(wandb)
        say(wandb.start())
    with quiet_lightning():
        trainer = build_trainer(cfg, parts, layout, folder, device, loggers)
    if compile_pays(cfg.compile, device):
        parts.module.denoiser.backbone.compile()  # in place: the checkpoint's keys stay as they are
    checkpoint = folder / runs.CHECKPOINT if cfg.resume else None
    with quiet_lightning():
        trainer.fit(
            parts.module, datamodule=parts.datamodule, ckpt_path=checkpoint, weights_only=True
        )
        if not interrupted(trainer):
            trainer.validate(parts.module, datamodule=parts.datamodule, verbose=False)
    if trainer.is_global_zero:
        summary = summarise(cfg, parts, trainer, clock, device)
        runs.write_summary(folder, summary)
        if wandb:
            wandb.finish(summary)
        say_result(folder, parts, trainer)


def build_trainer(
    cfg: DictConfig,
    parts: Parts,
    layout: BatchLayout,
    folder: Path,
    device: torch.device,
    loggers: list[Logger],
) -> lightning.Trainer:
    """Lightning's Trainer: an endless stream of micro-batches, cut at `trainer.max_steps`."""
    facts = {
        "checkpoint": {"folder": folder / runs.CHECKPOINT.parent},
        "sample_grid": {"pipeline": parts.pipeline, "folder": folder / runs.SAMPLES},
        "evaluation": {"pipeline": parts.pipeline, "metrics": parts.metrics},
    }
    for name in facts.keys() & parts.callbacks.keys():
        parts.callbacks[name] = parts.callbacks[name](**facts[name])
    return instantiate(
        cfg.trainer,
        precision=pick_precision(cfg.trainer.precision, device),
        accumulate_grad_batches=layout.accumulate,
        limit_train_batches=cfg.trainer.max_steps * layout.accumulate,
        val_check_interval=cfg.validate_every_n_steps * layout.accumulate,
        check_val_every_n_epoch=None,
        max_epochs=-1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=console.is_terminal,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=loggers,
        callbacks=[*parts.callbacks.values(), Interruption(), progress_callback()],
        plugins=[AtomicCheckpointIO()],
    )


def summarise(
    cfg: DictConfig, parts: Parts, trainer: lightning.Trainer, clock: Clock, device: torch.device
) -> dict[str, object]:
    """What is worth knowing of a run at a glance."""
    evaluation = parts.callbacks.get("evaluation")
    validation = {
        name: round(float(value), 6)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val")
    }
    return {
        "name": cfg.name,
        "finished": not interrupted(trainer),
        "steps": trainer.global_step,
        "images_seen": parts.module.images_seen,
        "wall_seconds": round(clock.seconds(), 1),
        "parameters": sum(p.numel() for p in parts.module.denoiser.parameters()),
        "precision": trainer.precision,
        "ranks": trainer.world_size,
        "metrics": (evaluation.results if evaluation else {}) | validation,
        **runs.environment(device),
    }


def say_result(folder: Path, parts: Parts, trainer: lightning.Trainer) -> None:
    """The lines that a person waits for."""
    if interrupted(trainer):
        say(f"Stopped at step {trainer.global_step}; nothing is lost. Go on with:")
        say(f"  diffusion-lab train resume={folder}")
        return
    if evaluation := parts.callbacks.get("evaluation"):
        for line in report(evaluation.results):
            say(line)
    if grid := parts.callbacks.get("sample_grid"):
        say(f"Samples: {grid.latest}")
    say(f"Summary: {folder / runs.SUMMARY}")


def plain(cfg: DictConfig) -> dict:
    """The configuration as nested dictionaries, resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences advice that does not apply: the data is one tensor, needs no workers and resumes."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hints = (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*`srun` command is available.*",
        ".*is smaller than the logging interval.*",
        ".*It is recommended to use `self.log.*",  # reduced by hand
        ".*isinstance.treespec, LeafSpec.*",
    )
    with warnings.catch_warnings():
        for hint in hints:
            warnings.filterwarnings("ignore", hint)
        yield
