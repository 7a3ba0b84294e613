"""Run folders: where a run keeps what it knows of itself, and how it is read back.

config.yaml  checkpoints/last.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
"""

import json
import os
import platform
import subprocess
import uuid
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.autoencoder import files
from diffusion_lab.build import Model, build_datamodule, build_model
from diffusion_lab.dashboard.names import grouped
from diffusion_lab.data import ImageDataModule
from diffusion_lab.distributed import on_rank_zero, rank_and_world
from diffusion_lab.errors import UserError
from diffusion_lab.files import write_atomically
from diffusion_lab.first_stage import hub

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
CHECKPOINT = Path("checkpoints/last.ckpt")
WEIGHTS_PREFIX = "denoiser."
DATA = ("data.root", "data.path", "data.test_path")  # where the same images are
RESUMABLE = ("trainer.", "callbacks.", "logger.", *DATA, "validate_every_n_steps")


def check_new(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.run_dir` already holds a run."""
    if cfg.run_dir and Path(cfg.run_dir).is_file():
        raise UserError(f"run_dir={cfg.run_dir} is a file; choose a folder")
    if cfg.run_dir and (Path(cfg.run_dir) / CONFIG).exists():
        if not (Path(cfg.run_dir) / CHECKPOINT).is_file():
            raise UserError(
                f"run_dir={cfg.run_dir} holds a run without {CHECKPOINT}: let it train if it does, "
                "or delete the folder if it was killed, and try again"
            )
        raise UserError(
            f"run_dir={cfg.run_dir} already holds a run; choose another folder, or go on with it "
            f"by resume={cfg.run_dir}"
        )


def create(cfg: DictConfig) -> Path:
    """Makes the folder of a new run on rank 0, with its configuration; every rank gets its name.

    It is `cfg.run_dir`, or outputs/<name>/<timestamp>.
    """

    def make() -> Path:
        if cfg.logger and not cfg.logger.run_id:
            cfg.logger.run_id = _new_run_id()  # before W&B starts, so that resuming finds it
        if cfg.logger and HydraConfig.initialized():
            cfg.logger.choices = grouped(HydraConfig.get().runtime.choices)
        folder = _make_folder(cfg)
        save_config(folder, cfg)
        return folder

    return on_rank_zero(make)


def _new_run_id() -> str:
    """Of W&B, whose agent has chosen it already for a run of a sweep of W&B's."""
    chosen = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return chosen or uuid.uuid4().hex[:8]


def _make_folder(cfg: DictConfig) -> Path:
    if cfg.run_dir:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        return Path(cfg.run_dir)
    stamp = Path("outputs") / cfg.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, attempt = stamp, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started within this second
            attempt += 1
            folder = stamp.with_name(f"{stamp.name}_{attempt}")


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration, every interpolation resolved, on rank 0."""
    if rank_and_world()[0] == 0:
        write_atomically(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))


def load_config(folder: str | Path) -> DictConfig:
    """The configuration of a run; raises UserError where there is no run."""
    folder = Path(str(folder))  # a folder 2024 is a number to Hydra
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in Path("outputs").glob(f"*/*/{CONFIG}"))
        hint = f"; the latest here is {known[-1]}" if known else ""
        raise UserError(
            f"{folder} is no run folder, it has no {CONFIG}; give a folder that train made{hint}"
        )
    try:
        cfg = OmegaConf.load(folder / CONFIG)
        OmegaConf.set_struct(cfg, True)
        if "run" in cfg.get("first_stage", {}):
            cfg.first_stage.run = str(folder)  # its own copy, wherever it now is
        if "path" in cfg.get("first_stage", {}):
            cfg.first_stage.path = str(folder / hub.FOLDER)
    except Exception as error:  # YAML's errors and OmegaConf's have no common name
        raise UserError(f"{folder / CONFIG} is damaged and cannot be read") from error
    return cfg


def trained_by(cfg: DictConfig) -> str:
    """The command that a run of this configuration is trained by."""
    return "train-autoencoder" if "autoencoder" in cfg else "train"


def resumed(folder: str, overrides: list[str], command: str) -> DictConfig:
    """The configuration of a run for `command` to go on with; `overrides` replace its values.

    Raises UserError for an override that would make it another model.
    """
    cfg = load_config(folder)
    if command != trained_by(cfg):
        raise UserError(
            f"{folder} was not made by {command}; write diffusion-lab {trained_by(cfg)} "
            f"resume={folder}"
        )
    if not (Path(folder) / CHECKPOINT).is_file():
        raise UserError(
            f"{folder} has no {CHECKPOINT} to go on from; delete the folder and start the run anew"
        )
    summary = load_summary(folder)
    # which is written again from the checkpoint
    lost = "autoencoder" in cfg and not (Path(folder) / files.FILE).is_file()
    longer = any(o.startswith(("trainer.max_steps=", "trainer.max_time=")) for o in overrides)
    if summary.get("finished") and not longer and not lost:
        raise UserError(
            f"{folder} is finished; write trainer.max_steps above {summary['steps']} (and a longer "
            f"trainer.max_time if it has one) to train it longer"
        )
    parser = OverridesParser.create()
    for override in overrides:
        parsed = parser.parse_override(override)
        key = parsed.key_or_group
        if key == "resume":
            continue
        if not key.startswith(RESUMABLE):
            raise UserError(
                f"{override.lstrip('+')} cannot change in a run that is resumed; only values of "
                f"{', '.join(RESUMABLE)} can, as in trainer.max_steps=20000"
            )
        OmegaConf.update(cfg, key, parsed.value())
    cfg.resume = str(folder)
    return cfg


def load(folder: str | Path, cfg: DictConfig | None = None) -> tuple[ImageDataModule, Model]:
    """A trained run: its data (unread) and its model with averaged weights.

    Nothing about the model needs to be said again; `cfg` is the run's configuration, if it has been
    read already. Raises UserError if the checkpoint is missing or damaged.
    """
    cfg = cfg or load_config(folder)
    datamodule = build_datamodule(cfg)
    model = build_model(cfg, datamodule.image_shape, datamodule.num_classes)
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise UserError(f"{folder} has no {CHECKPOINT} yet; let it train to its first checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        raise UserError(f"{path} is damaged and cannot be read; train the run again") from error
    weights = {
        name.removeprefix(WEIGHTS_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    try:
        model.denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {folder}/{CONFIG}: it is of another model") from error
    return datamodule, model


def load_summary(folder: str | Path) -> dict:
    """summary.json of a run, or an empty dictionary before there is one."""
    try:
        return json.loads((Path(folder) / SUMMARY).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def write_summary(folder: Path, summary: dict) -> None:
    """Writes summary.json, whole or not at all."""
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def environment(device: torch.device) -> dict[str, object]:
    """What a figure depends on besides the configuration: device, versions and commit."""
    names = ("diffusion-lab", "torch", "torchvision", "lightning", "hydra-core", "wandb")
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with -dirty; None if installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
