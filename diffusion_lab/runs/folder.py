"""Run folders: their content, the place of a new one, and the saved configuration of each.

config.yaml  checkpoints/*.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
error.txt  (if it failed)
snapshots/*.safetensors  averages/*/  (with callbacks.posthoc_ema)
published.json in place of checkpoints, samples and wandb, if the run is published
"""

import itertools
import os
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.common.files import OUTPUTS, write_atomically, write_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute import slurm
from diffusion_lab.compute.distributed import on_rank_zero, rank_and_world
from diffusion_lab.first_stage import hub
from diffusion_lab.runs import checkpoints, trusted_targets
from diffusion_lab.runs.current import EXPORTED
from diffusion_lab.runs.files import CONFIG, FORMAT, SUMMARY, WRITTEN_BY, load_record
from diffusion_lab.runs.log_names import grouped
from diffusion_lab.runs.progress import is_locked
from diffusion_lab.runs.summary import Summary, load_summary

ABANDONED = ".abandoned"  # folder beside a study's runs, of those that left no checkpoint


def check_new(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.run_dir` already holds a run."""
    if not cfg.run_dir:
        return
    folder = Path(cfg.run_dir)
    if folder.is_file():
        raise UserError(f"run_dir={folder} is a file; choose a folder")
    if (folder / EXPORTED).exists():
        raise UserError(f"run_dir={folder} contains an exported model; choose another folder")
    if not (folder / CONFIG).exists():
        return
    if checkpoints.exists(folder):
        raise UserError(
            f"run_dir={folder} already contains a run; choose another folder, or resume the run "
            f"with resume={folder}"
        )
    raise UserError(
        f"run_dir={folder} contains a run without {checkpoints.LAST}; wait if it is training, or "
        "delete the folder if it was killed"
    )


def create(cfg: DictConfig, command: str, overrides: list[str]) -> Path:
    """Creates the folder of a new run on rank 0; returns its path on every rank.

    The folder is `cfg.run_dir`, or outputs/<name>/<timestamp>. A requeued SLURM job recognises it
    by `command` and `overrides`. Raises UserError if the folder cannot be created.
    """

    def make() -> Path:
        for name, logger in (cfg.get("logger") or {}).items():
            if "run_id" in logger and not logger.run_id:
                # set before a logger starts, so that resuming finds it; W&B's agent may have one
                sweeping = name == "wandb" and "WANDB_SWEEP_ID" in os.environ
                chosen = os.environ.get("WANDB_RUN_ID") if sweeping else None
                logger.run_id = chosen or uuid.uuid4().hex[:8]
        if HydraConfig.initialized():
            cfg.choices = grouped(HydraConfig.get().runtime.choices)
        try:
            folder = _make_folder(cfg)
            slurm.sign(folder, command, overrides)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be created ({error.strerror}); choose another place with "
                "run_dir=..."
            ) from error
        return folder

    return on_rank_zero(make)


def _make_folder(cfg: DictConfig) -> Path:
    if cfg.run_dir:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        return Path(cfg.run_dir)
    stamp = OUTPUTS / cfg.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = stamp
    for attempt in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run started within this second
            folder = stamp.with_name(f"{stamp.name}_{attempt}")
    return folder


def unfinished(name: str) -> Path | None:
    """The latest run `name` in outputs/ with a checkpoint that is neither finished nor running."""
    folders = sorted(path.parent for path in (OUTPUTS / name).glob(f"*/{CONFIG}"))
    for folder in reversed(folders):
        done = load_summary(folder).finished
        if checkpoints.exists(folder) and not done and not is_locked(folder):
            return folder
    return None


def reopen(folder: Path) -> None:
    """Marks a finished run as unfinished in its summary before it is trained longer; on rank 0.

    Without this a run killed during that training would still count as finished at its old length.
    """
    summary = load_summary(folder)
    if summary.finished:
        write_summary(folder, replace(summary, finished=False))


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes summary.json atomically."""
    write_json(folder / SUMMARY, summary.to_json())


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration on rank 0, with every interpolation resolved."""
    if rank_and_world()[0] == 0:
        written_by = {WRITTEN_BY: {"format": FORMAT, "version": diffusion_lab.__version__}}
        text = OmegaConf.to_yaml(written_by) + OmegaConf.to_yaml(cfg, resolve=True)
        write_atomically(folder / CONFIG, text)


def load_config(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run whose classes will be built; raises UserError.

    Warns of classes that belong neither to this package nor to torch or lightning.
    """
    cfg = load_record(folder)
    first_stage = cfg.get("first_stage", {})  # an autoencoder's run has none
    if "run" in first_stage:
        first_stage.run = verbatim(str(folder))  # the copy in the folder, wherever that now is
    if "path" in first_stage:
        first_stage.path = verbatim(str(Path(folder) / hub.COPY_FOLDER))
    trusted_targets.check(cfg, Path(folder) / CONFIG)
    return cfg
