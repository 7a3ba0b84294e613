"""Run folders: what is in them, and where a new one goes.

config.yaml  checkpoints/*.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
"""

import json
import os
import uuid
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import OUTPUTS, write_atomically
from diffusion_lab.compute import slurm
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.metrics.log_names import grouped
from diffusion_lab.runs import checkpoints, weights
from diffusion_lab.runs.lock import is_locked

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
ABANDONED = ".abandoned"  # beside runs of a study: those that ended before their first checkpoint


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
    """A new W&B run id, or the one that the sweep agent has set."""
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
    """The latest run of this name in outputs/ that has a checkpoint, no end and no trainer."""
    folders = sorted(path.parent for path in (OUTPUTS / name).glob(f"*/{CONFIG}"))
    for folder in reversed(folders):
        done = load_summary(folder).get("finished")
        if checkpoints.exists(folder) and not done and not is_locked(folder):
            return folder
    return None


def load_summary(folder: str | Path) -> dict:
    """summary.json of a run; an empty dictionary before there is one, or if it is damaged."""
    try:
        summary = json.loads((Path(folder) / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def reopen(folder: Path) -> None:
    """Marks a run that is trained longer as not finished in its summary; on rank 0.

    Otherwise a run that is killed meanwhile would be taken for a finished one of its old length.
    """
    summary = load_summary(folder)
    if summary.get("finished"):
        write_summary(folder, summary | {"finished": False})


def write_summary(folder: Path, summary: dict) -> None:
    """Writes summary.json, whole or not at all."""
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
