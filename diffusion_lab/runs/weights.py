"""The weights of a trained denoiser: in the checkpoint of a run, or exported from it."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_lab.common.errors import UserError
from diffusion_lab.runs import checkpoints

EXPORTED = "model.safetensors"  # in the folder of an export
PREFIX = "denoiser."  # of the denoiser's weights in a checkpoint
CHECKPOINT, STAMP = "checkpoint", "weights_file"  # of what was measured: of which weights it is
KINDS = {"averaged": "state_dict", "raw": "current_model_state"}  # and where a checkpoint has them


def file_of(folder: str | Path) -> Path:
    """What holds a run's weights: what was exported, or its newest whole checkpoint.

    Raises UserError if there is neither.
    """
    exported = Path(folder) / EXPORTED
    return exported if exported.is_file() else checkpoints.newest_whole(folder)


def read(folder: str | Path) -> dict[str, Tensor]:
    """The denoiser's weights, averaged, or as they were exported; raises UserError."""
    path = file_of(folder)
    if path.name != EXPORTED:
        return from_checkpoint(folder, "averaged")[0]
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); export the run again") from error


def from_checkpoint(folder: str | Path, kind: str) -> tuple[dict[str, Tensor], int]:
    """The denoiser's weights in a run's newest whole checkpoint, and their step.

    `kind` is of KINDS; where no average was kept the two are the same. Raises UserError.
    """
    path = checkpoints.newest_whole(folder)
    checkpoints.say_if_older(folder, path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get(KINDS[kind], checkpoint["state_dict"])
    weights = {
        name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)
    }
    return weights, checkpoint["global_step"]


def fingerprint(folder: str | Path) -> str:
    """sha256 of the file with a run's weights."""
    return _sha256(file_of(folder))


def stamp(folder: str | Path) -> dict[str, object]:
    """Name, size and time of the file with a run's weights, which is not read; raises UserError."""
    path = _in_place(folder)
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def identity(folder: str | Path) -> dict[str, object]:
    """What a measurement keeps to say which weights it is of; raises UserError."""
    file = stamp(folder)
    return {CHECKPOINT: fingerprint(folder), STAMP: file}


def require_unchanged(folder: str | Path, known: Mapping[str, object]) -> None:
    """Raises UserError if a run has saved other weights since its `identity` was `known`."""
    if stamp(folder) != known[STAMP]:
        raise UserError(
            f"{folder} saved new weights while it was read, as it is being trained; write the "
            "command again"
        )


class Present:
    """The weights that a run has now, to be told from those that something was measured of.

    They are read only if what was measured does not say the file's name, size and time, or others.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder

    @cached_property
    def stamp(self) -> dict[str, object] | None:
        """None: the weights are gone."""
        try:
            return stamp(self.folder)
        except UserError:
            return None

    def are_those_of(self, record: Mapping[str, object]) -> bool:
        """Of a record's STAMP, else of its CHECKPOINT, a sha256; of weights that are gone, no."""
        if self.stamp is None:
            return False
        if record.get(STAMP) == self.stamp:
            return True
        measured = record.get(CHECKPOINT)
        return measured is not None and (measured == self._as_it_is or measured == self._whole)

    @cached_property
    def _as_it_is(self) -> str:
        return _sha256(_in_place(self.folder))

    @cached_property
    def _whole(self) -> str:
        return fingerprint(self.folder)


def _in_place(folder: str | Path) -> Path:
    """What holds a run's weights if it is whole, at a glance; raises UserError."""
    names = (EXPORTED, checkpoints.LAST, checkpoints.PREVIOUS)
    for path in (Path(folder) / name for name in names):
        if path.is_file():
            return path
    return file_of(folder)  # which says what is missing


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
