"""Searches folders for runs."""

import os
from collections.abc import Iterator
from pathlib import Path

from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.files import CONFIG, LAST, METRICS, SUMMARY
from diffusion_lab.runs.progress import FILE as LOCK

LEFT = (SUMMARY, METRICS, LAST, LOCK)  # what a run may leave beside its configuration


def walk(path: Path) -> Iterator[tuple[Path, bool, list[str], list[str]]]:
    """Yields the folders at and below a path, each once, and the names of its folders and files.

    Before the names it says whether the folder is a run's: if it has a configuration, and something
    that a run leaves. Symbolic links are followed; hidden folders and those inside a run are left
    out. As in `os.walk`, the folders that the caller removes from the list are not visited. Raises
    UserError if the path is not a folder.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give run folders, or folders that contain some")
    seen = set()
    for name, folders, files in os.walk(path, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:  # reached before, by a symbolic link
            folders.clear()
            continue
        seen.add(folder.resolve())
        is_run = CONFIG in files and any((folder / name).exists() for name in LEFT)
        # nothing inside a run, such as W&B's files, is another run
        inside = [] if is_run else [each for each in folders if not each.startswith(".")]
        folders[:] = sorted(inside)
        yield folder, is_run, folders, files


def run_at(path: Path) -> Path:
    """The run of a checkpoint, or the only run in a folder; else the path itself."""
    if path.suffix == ".ckpt" and path.parent.name == LAST.parent.name:
        return path.parent.parent
    inside = [each.parent for each in path.glob(f"*/{CONFIG}")]
    return inside[0] if len(inside) == 1 and not (path / CONFIG).exists() else path
