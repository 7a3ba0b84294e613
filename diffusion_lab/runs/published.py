"""Published runs: the records of a run without its weights, sealed by published.json.

That file has the checksum of each record, and of the weights that they belong to.
"""

from pathlib import Path
from typing import Any

from diffusion_lab.common import hashing
from diffusion_lab.common.files import read_json, write_json
from diffusion_lab.common.messages import UserError

PUBLISHED = "published.json"
WEIGHTS, FILES, THINNED = "checkpoint", "files", "thinned"  # its keys
RATE = "images_per_second"  # of THINNED: the median before rows were left out


def is_published(folder: str | Path) -> bool:
    """Whether a run folder was written by `diffusion-lab publish`."""
    return (Path(folder) / PUBLISHED).is_file()


def facts_of(folder: str | Path) -> dict[str, Any]:
    """The content of published.json; an empty dictionary if it is missing or damaged."""
    return read_json(Path(folder) / PUBLISHED)


def seal(folder: Path, weights: str | None, thinned: dict[str, object] | None) -> None:
    """Writes published.json for all other files in a folder.

    `weights` is the sha256 of the file with the weights, or None if that is gone. `thinned` says
    how many rows of metrics.jsonl there were, if some were left out.
    """
    write_json(folder / PUBLISHED, {WEIGHTS: weights, THINNED: thinned, FILES: checksums(folder)})


def checksums(folder: Path, without: tuple[str, ...] = (PUBLISHED,)) -> dict[str, str]:
    """The sha256 of each file below a folder by its relative path, except those named `without`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: hashing.of_file(path) for name, path in names.items() if name not in without}


def require_unchanged_records(folder: Path) -> None:
    """Raises UserError, which names the file, if a published run's record is not as published."""
    if not is_published(folder):
        return
    known, found = facts_of(folder).get(FILES), checksums(folder)
    if not isinstance(known, dict):
        raise UserError(f"{folder / PUBLISHED} is damaged; get the published folder again")
    # other files, such as one that locks the run, are no records
    added = {name for name in found if "/" in name and name not in known}
    for name in sorted(known.keys() | added):
        if known.get(name) == found.get(name):
            continue
        problem = "was added" if name in added else "was changed" if name in found else "is missing"
        raise UserError(
            f"{folder / name} {problem} after the run was published; get the published folder again"
        )
