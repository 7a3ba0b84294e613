"""Run folders: where a run keeps what it knows of itself, and how it is read back.

config.yaml  checkpoints/last.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
"""

import hashlib
import json
import platform
import subprocess
import uuid
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.build import Model, build_datamodule, build_model, build_pipeline
from diffusion_lab.data import ImageDataModule
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.device import autocast, pick_device, pick_precision
from diffusion_lab.distributed import from_rank_zero, rank_and_world
from diffusion_lab.errors import UserError
from diffusion_lab.files import write_atomically
from diffusion_lab.pipeline import Pipeline

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
CHECKPOINT = Path("checkpoints/last.ckpt")
WEIGHTS_PREFIX = "denoiser."
RESUMABLE = ("trainer.", "callbacks.", "logger.", "data.root", "validate_every_n_steps")


def check_new(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.run_dir` already holds a run."""
    if cfg.run_dir and Path(cfg.run_dir).is_file():
        raise UserError(f"run_dir={cfg.run_dir} is a file; choose a folder")
    if cfg.run_dir and (Path(cfg.run_dir) / CONFIG).exists():
        raise UserError(
            f"run_dir={cfg.run_dir} already holds a run; choose another folder, or go on with it "
            f"by resume={cfg.run_dir}"
        )


def create(cfg: DictConfig) -> Path:
    """Makes the folder of a new run on rank 0, with its configuration; every rank gets its name.

    It is `cfg.run_dir`, or outputs/<name>/<timestamp>.
    """
    folder = None
    if rank_and_world()[0] == 0:
        if cfg.logger and not cfg.logger.run_id:
            cfg.logger.run_id = uuid.uuid4().hex[:8]  # before W&B starts, so that resuming finds it
        folder = _make_folder(cfg)
        save_config(folder, cfg)
    return from_rank_zero(folder)


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
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in Path("outputs").glob(f"*/*/{CONFIG}"))
        hint = f"; the latest here is {known[-1]}" if known else ""
        raise UserError(
            f"{folder} is no run folder, it has no {CONFIG}; give a folder that train made{hint}"
        )
    try:
        cfg = OmegaConf.load(folder / CONFIG)
        OmegaConf.set_struct(cfg, True)
    except Exception as error:  # YAML's errors and OmegaConf's have no common name
        raise UserError(f"{folder / CONFIG} is damaged and cannot be read") from error
    return cfg


def resumed(folder: str, overrides: list[str]) -> DictConfig:
    """The configuration of a run to go on with; values in `overrides` replace its own.

    Raises UserError for an override that would make it another model.
    """
    cfg = load_config(folder)
    if not (Path(folder) / CHECKPOINT).is_file():
        raise UserError(f"{folder} has no {CHECKPOINT} to go on from; start the run anew")
    summary = load_summary(folder)
    longer = any(o.startswith(("trainer.max_steps=", "trainer.max_time=")) for o in overrides)
    if summary.get("finished") and not longer:
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
                f"{override} cannot change in a run that is resumed; only values of "
                f"{', '.join(RESUMABLE)} can, as in trainer.max_steps=20000"
            )
        OmegaConf.update(cfg, key, parsed.value())
    cfg.resume = str(folder)
    return cfg


def inherit(
    cfg: DictConfig, saved: DictConfig, groups: tuple[str, ...], overrides: list[str]
) -> None:
    """Gives `cfg` the choice of a run, `saved`, in each group, unless `overrides` choose another.

    Single values in `overrides`, as in sampler.steps=20, change the run's choice.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    keys = {override.key_or_group: override for override in parsed}
    with open_dict(cfg):
        cfg.data = saved.data
        for group in groups:
            if any(key == group or key.startswith(f"{group}/") for key in keys):
                continue
            cfg[group] = saved[group]
            for key, override in keys.items():
                if key.startswith(f"{group}."):
                    OmegaConf.update(cfg, key, override.value())


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


@dataclass(frozen=True)
class OpenRun:
    """A trained run, ready to be sampled from on a device."""

    saved: DictConfig  # its configuration
    datamodule: ImageDataModule  # unread
    model: Model
    device: torch.device
    precision: str
    fingerprint: str  # sha256 of its checkpoint

    @property
    def autocast(self) -> torch.autocast:
        """The block in which the network is asked."""
        return autocast(self.precision, self.device)

    def pipeline(self, cfg: DictConfig) -> Pipeline:
        """Sampling as `cfg.sampler` and `cfg.guidance` say."""
        weak = load_weak(cfg.guidance, self.saved)
        return build_pipeline(cfg, self.model, self.datamodule.num_classes, weak)


def open_run(cfg: DictConfig) -> OpenRun:
    """The run `cfg.run` with averaged weights; `cfg.data_root` is where its data is now, if moved.

    Raises UserError for what is missing, damaged or impossible on this machine.
    """
    saved = load_config(cfg.run)
    if cfg.data_root:
        saved.data.root = cfg.data_root
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    autocast(precision, device)  # to hear now what it has to say
    datamodule, model = load(cfg.run, saved)
    model.denoiser.to(device).eval().requires_grad_(False)
    with (Path(cfg.run) / CHECKPOINT).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OpenRun(saved, datamodule, model, device, precision, digest)


def load_weak(guidance: DictConfig, saved: DictConfig) -> Denoiser | None:
    """The denoiser of `guidance.weak_run`, if any, for a run whose configuration is `saved`.

    Raises UserError if it was trained on other data, labels or noise levels.
    """
    folder = guidance.get("weak_run")
    if folder is None:
        return None
    other = load_config(folder)
    for part in ("schedule", "first_stage", "conditioning"):
        if other[part] != saved[part]:
            raise UserError(
                f"guidance.weak_run={folder} was trained with another {part}; give a run that "
                "differs in size or training time only"
            )
    datamodule, model = load(folder, other)
    ours = build_datamodule(saved)
    facts = [(data.image_shape, data.num_classes) for data in (datamodule, ours)]
    if facts[0] != facts[1]:
        raise UserError(
            f"guidance.weak_run={folder} was trained on images of shape {facts[0][0]} in "
            f"{facts[0][1]} classes, this run on {facts[1][0]} in {facts[1][1]}; "
            "give a run on the same data"
        )
    return model.denoiser.eval().requires_grad_(False)


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
