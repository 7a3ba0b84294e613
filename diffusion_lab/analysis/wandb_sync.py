"""The command `sync`: finds offline W&B runs on the disk and uploads them by `wandb sync`."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.runs.folder import ABANDONED
from diffusion_lab.runs.progress import is_locked
from diffusion_lab.runs.search import walk
from diffusion_lab.training.logger.run_logger import why_unreachable


def sync(cfg: DictConfig, overrides: list[str]) -> dict[str, bool]:
    """Lists offline W&B runs and uploads the waiting ones; returns by folder which are uploaded."""
    paths = as_list(cfg.paths)
    runs = find(Path(str(path)) for path in paths)
    waiting = [run for run in runs if not is_uploaded(run)]
    for run in runs:
        say(f"{'to upload' if run in waiting else 'uploaded '}  {run.parent}")
    if not waiting:
        where = ", ".join(str(path) for path in paths)
        found = f"all {len(runs)} offline W&B runs are uploaded" if runs else "no offline W&B runs"
        say(f"Nothing to upload in {where}: {found}")
    elif cfg.dry_run:
        say(f"{len(waiting)} of {len(runs)} would be uploaded; nothing was sent (dry_run=true)")
    elif reason := why_unreachable():
        raise UserError(f"nothing was uploaded: {reason}")
    else:
        upload(waiting)
        say(f"Uploaded {len(waiting)}")
    return {str(run.parent): is_uploaded(run) for run in runs}


def is_uploaded(file: Path) -> bool:
    """Whether W&B has marked the file as uploaded, and nothing was written to it since."""
    mark = file.with_suffix(".wandb.synced")
    return mark.exists() and mark.stat().st_mtime >= file.stat().st_mtime


def find(paths: Iterable[Path]) -> list[Path]:
    """Finds the files run-<id>.wandb of offline runs at and below the paths, sorted by time.

    A path to a W&B file or its folder is taken even if the run was online, because its upload may
    have been cut short. Runs below a path that were abandoned, or are being trained, are left out
    with a message. Raises UserError for a path that does not exist, or is another file.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} does not exist; give a run folder, or a folder that contains some"
            )
        if path.is_file() and path.suffix != ".wandb":
            raise UserError(f"{path} is not a W&B file; their names end in .wandb")
        files = [path] if path.is_file() else [*path.glob("*.wandb"), *_to_be_kept(path)]
        found |= {file.resolve(): file for file in files}
    return sorted(found.values(), key=lambda file: file.parent.name)


def _to_be_kept(path: Path) -> Iterator[Path]:
    """Yields the files of offline runs below the path, and says what it leaves out and why."""
    left_out = {}
    inside = {*path.glob("**/offline-run-*/*.wandb")}  # also of a path inside a run
    for folder, *_ in walk(path):  # which follows links
        inside |= {*folder.glob("wandb/offline-run-*/*.wandb")}
    for file in sorted(inside):
        run = file.parents[2]  # run/wandb/offline-run-<time>-<id>/run-<id>.wandb
        if ABANDONED in file.relative_to(path).parts:
            left_out[run] = "it was abandoned"
        elif is_locked(run):
            left_out[run] = "it is being trained"
        else:
            yield file
    for run, why in left_out.items():
        say(f"skipped    {run}: {why}")


def upload(runs: list[Path]) -> None:
    """Uploads runs; raises UserError, with the number that are still here, if W&B fails."""
    # `runs` are chosen already; the ones marked as synced have grown since
    options = ["--yes", "--include-online", "--include-synced"]
    command = [sys.executable, "-m", "wandb", "sync", *options, *map(str, runs)]
    # in a new W&B service: one that has served an offline run marks files but sends none
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["WANDB_MODE"] = "online"
    subprocess.run(command, env=environment, stdout=sys.stderr.fileno())
    if left := sum(not is_uploaded(run) for run in runs):
        raise UserError(
            f"{left} of {len(runs)} were not uploaded, for the reason that W&B gives above; they "
            "are kept, and the same command tries again"
        )
