"""Published runs: the records of a run without its weights, sealed by published.json.

That file has the checksum of each record, and of the weights that they belong to.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.common import hashing
from diffusion_lab.common.files import read_json, write_json
from diffusion_lab.common.messages import UserError

PUBLISHED = "published.json"
WEIGHTS, FILES, THINNED = "checkpoint", "files", "thinned"  # its keys
MEASURED = ("evaluations", "memorization")  # folders in which any file is a record
CARD, WRITER = "card.json", "diffusion-lab publish"  # lists all files of a published folder
REMEDY = "get the published folder again"
# of THINNED, before rows were left out: the median, and how far gradients rose above their median
RATE, SPIKE = "images_per_second", "gradient_spike"


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


def unseal(folder: Path) -> None:
    """Removes published.json, if there is one, before files in the folder change."""
    (folder / PUBLISHED).unlink(missing_ok=True)


def checksums(folder: Path, without: tuple[str, ...] = (PUBLISHED,)) -> dict[str, str]:
    """The sha256 of each file below a folder by its relative path, except those named `without`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: hashing.of_file(path) for name, path in names.items() if name not in without}


def require_unchanged_records(folder: Path) -> None:
    """Raises UserError, which names the file, if a published run's record is not as published."""
    if not is_published(folder):
        return
    known = facts_of(folder).get(FILES)
    if not isinstance(known, dict):
        raise UserError(f"{folder / PUBLISHED} is damaged; {REMEDY}")
    require_same_files(folder, known)
    for path in sorted(path for name in MEASURED for path in (folder / name).rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            raise UserError(f"{path} was added after the run was published; {REMEDY}")


def require_same_files(folder: Path, known: Mapping[str, str]) -> None:
    """Raises UserError, which names a file, unless all files are there with their known sha256."""
    for name, checksum in known.items():
        path = folder / name
        if not path.is_file() or hashing.of_file(path) != checksum:
            problem = "was changed" if path.is_file() else "is missing"
            raise UserError(f"{path} {problem} after it was published; {REMEDY}")


def has_card(folder: Path) -> bool:
    """Whether a folder is the whole folder that `publish` wrote."""
    written_by = read_json(folder / CARD).get("written_by")
    return isinstance(written_by, dict) and written_by.get("command") == WRITER


def require_whole(folder: Path) -> None:
    """Raises UserError, which names a file, if a file on a published folder's card has changed."""
    if has_card(folder):
        require_same_files(folder, read_json(folder / CARD).get("sha256", {}))
