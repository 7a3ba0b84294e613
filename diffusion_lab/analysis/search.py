"""Walks through folders in search of runs."""

import os
from collections.abc import Iterator
from pathlib import Path

from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.checkpoints import LAST
from diffusion_lab.runs.folder import CONFIG, METRICS, SUMMARY
from diffusion_lab.runs.lock import FILE as LOCK


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a configuration, and something that a run leaves."""
    left = (folder / name for name in (SUMMARY, METRICS, LAST, LOCK))
    return (folder / CONFIG).is_file() and any(path.exists() for path in left)


def walk(path: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields the folders at and below a path, each once, with the names of its folders and files.

    Symbolic links are followed; hidden folders and those inside a run are left out. As in
    `os.walk`, the folders that the caller removes from the list are not visited. Raises UserError
    if the path is not a folder.
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
        # nothing inside a run, such as W&B's files, is another run
        inside = [] if is_run(folder) else [each for each in folders if not each.startswith(".")]
        folders[:] = sorted(inside)
        yield folder, folders, files
