"""Run folders: where a run keeps what it knows of itself, and how it is read back.

config.yaml  checkpoints/*.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
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
from torch import Tensor

from diffusion_lab.build.objects import Model, build_datamodule, build_model
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import write_atomically
from diffusion_lab.compute import slurm
from diffusion_lab.compute.distributed import on_rank_zero, rank_and_world
from diffusion_lab.data import ImageDataModule
from diffusion_lab.first_stage import hub
from diffusion_lab.first_stage.autoencoder import files
from diffusion_lab.metrics.log_names import grouped
from diffusion_lab.runs import checkpoints, targets, weights
from diffusion_lab.runs.lock import is_locked

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
OUTPUTS = Path("outputs")  # where runs go by default
ABANDONED = ".abandoned"  # beside runs of a study: those that ended before their first checkpoint
DATA = ("data.root", "data.path", "data.test_path")  # where the same images are
RESUMABLE = (
    "trainer.",
    "callbacks.",
    "logger.",
    *DATA,
    "validate_every_n_steps",
    "micro_batch_size",
    "activation_checkpointing",
)
# an option of a group is a file of values, of which a run that is resumed keeps its own
INSTEAD_OF_OPTIONS = {
    "trainer=cpu": "trainer.accelerator=cpu",
    "trainer=ddp": "trainer.strategy=ddp",
    "trainer=fsdp": "trainer.strategy={_target_:diffusion_lab.compute.sharding.FSDP}",
}


def check_new(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.run_dir` already holds a run."""
    if cfg.run_dir and Path(cfg.run_dir).is_file():
        raise UserError(f"run_dir={cfg.run_dir} is a file; choose a folder")
    if cfg.run_dir and (Path(cfg.run_dir) / weights.EXPORTED).exists():
        raise UserError(f"run_dir={cfg.run_dir} holds a model that was exported; choose another")
    if cfg.run_dir and (Path(cfg.run_dir) / CONFIG).exists():
        if not checkpoints.exists(cfg.run_dir):
            raise UserError(
                f"run_dir={cfg.run_dir} holds a run without {checkpoints.LAST}: let it train if it "
                "does, or delete the folder if it was killed, and try again"
            )
        raise UserError(
            f"run_dir={cfg.run_dir} already holds a run; choose another folder, or go on with it "
            f"by resume={cfg.run_dir}"
        )


def create(cfg: DictConfig, command: str, overrides: list[str]) -> Path:
    """Makes the folder of a new run on rank 0; every rank gets its name.

    It is `cfg.run_dir`, or outputs/<name>/<timestamp>. `command` and `overrides` are what was asked
    for, by which a job of SLURM knows it again. Raises UserError if it cannot be made.
    """

    def make() -> Path:
        if cfg.logger and not cfg.logger.run_id:
            cfg.logger.run_id = _new_run_id()  # before W&B starts, so that resuming finds it
        if cfg.logger and HydraConfig.initialized():
            cfg.logger.choices = grouped(HydraConfig.get().runtime.choices)
        try:
            folder = _make_folder(cfg)
            slurm.sign(folder, command, overrides)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be made ({error.strerror}); choose another place by "
                "run_dir=..."
            ) from error
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
    stamp = OUTPUTS / cfg.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, attempt = stamp, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started within this second
            attempt += 1
            folder = stamp.with_name(f"{stamp.name}_{attempt}")


def unfinished(name: str) -> Path | None:
    """The latest run of this name that was saved, has not reached its end and is not being trained.

    Of those in the folder where runs go by default.
    """
    folders = sorted(path.parent for path in (OUTPUTS / name).glob(f"*/{CONFIG}"))
    for folder in reversed(folders):
        done = load_summary(folder).get("finished")
        if checkpoints.exists(folder) and not done and not is_locked(folder):
            return folder
    return None


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration, every interpolation resolved, on rank 0."""
    if rank_and_world()[0] == 0:
        write_atomically(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))


def load_config(folder: str | Path) -> DictConfig:
    """The configuration of a run; raises UserError where there is no run.

    Warns of classes that no installation of this program has.
    """
    folder = Path(str(folder))  # a folder 2024 is a number to Hydra
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in OUTPUTS.glob(f"*/*/{CONFIG}"))
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
    targets.check(cfg, folder / CONFIG)
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
    if (Path(folder) / weights.EXPORTED).is_file():
        raise UserError(
            f"{folder} is an export, which cannot be trained on; go on with the run that it came "
            "from, by resume= and that run's folder"
        )
    if not checkpoints.exists(folder):
        raise UserError(
            f"{folder} has no {checkpoints.LAST} to go on from; delete the folder and start the "
            "run anew"
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
        if instead := INSTEAD_OF_OPTIONS.get(override):
            raise UserError(f"{override} cannot be written in resuming a run; write {instead}")
        if not key.startswith(RESUMABLE):
            raise UserError(
                f"{override.lstrip('+')} cannot change in a run that is resumed; only values of "
                f"{', '.join(RESUMABLE)} can, as in trainer.max_steps=20000"
            )
        OmegaConf.update(cfg, key, parsed.value())
    cfg.resume = str(folder)
    return cfg


def restarted(folder: Path) -> DictConfig:
    """The configuration of the run that a requeued job has begun, to go on with.

    If the job was ended before the first checkpoint, it begins again, in the same folder.
    """
    cfg = load_config(folder)
    cfg.resume = str(folder)
    return cfg


def load(folder: str | Path, cfg: DictConfig | None = None) -> tuple[ImageDataModule, Model]:
    """A trained run: its data (unread) and its model with averaged weights.

    Nothing about the model needs to be said again; `cfg` is the run's configuration, if it has been
    read already. A folder that `export` made is such a run, too. Raises UserError if the weights
    are missing or damaged.
    """
    return with_weights(folder, cfg or load_config(folder), weights.read(folder))


def with_weights(
    folder: str | Path, cfg: DictConfig, state: dict[str, Tensor]
) -> tuple[ImageDataModule, Model]:
    """The data (unread) and the model of a run whose denoiser has the weights `state`.

    Raises UserError if they are of another model.
    """
    datamodule = build_datamodule(cfg)
    model = build_model(cfg, datamodule.image_shape, datamodule.num_classes)
    try:
        model.denoiser.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}: they are of another model"
        ) from error
    return datamodule, model


def load_summary(folder: str | Path) -> dict:
    """summary.json of a run; an empty dictionary before there is one, or if it is damaged."""
    try:
        summary = json.loads((Path(folder) / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def reopen(folder: Path) -> None:
    """Has the summary of a run that is trained on say that it is not finished; on rank 0.

    Or a run that is killed while it is made longer would be taken for one of its old length.
    """
    summary = load_summary(folder)
    if summary.get("finished"):
        write_summary(folder, summary | {"finished": False})


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
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
