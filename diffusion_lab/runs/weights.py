"""The weights of a trained denoiser: in the checkpoint of a run, or exported from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import checkpoints

EXPORTED = "model.safetensors"  # in the folder of an export
PREFIX = "denoiser."  # before the names of the denoiser's weights in a checkpoint
CHECKPOINT, STAMP = "checkpoint", "weights_file"  # keys of records: sha256 and file stamp
KINDS = {"averaged": "state_dict", "raw": "current_model_state"}  # and where a checkpoint has them


def file_of(folder: str | Path) -> Path:
    """The file of a run's weights: the exported one, or its newest whole checkpoint.

    Raises UserError if there is neither.
    """
    exported = Path(folder) / EXPORTED
    return exported if exported.is_file() else checkpoints.newest_whole(folder)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """The denoiser's weights, averaged, or as they were exported; raises UserError."""
    path = file_of(folder)
    if path.name != EXPORTED:
        return load_from_checkpoint(folder, "averaged")[0]
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); export the run again") from error


def load_from_checkpoint(folder: str | Path, kind: str) -> tuple[dict[str, Tensor], int]:
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


def sha256_of(folder: str | Path) -> str:
    """The sha256 of the file with a run's weights."""
    return hashing.of_file(file_of(folder))


def file_stamp(folder: str | Path) -> dict[str, object]:
    """The name, size and time of the file with a run's weights; raises UserError without one."""
    names = (EXPORTED, checkpoints.LAST, checkpoints.PREVIOUS)
    there = [path for name in names if (path := Path(folder) / name).is_file()]
    path = there[0] if there else file_of(folder)  # which says what is missing
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def identify(folder: str | Path) -> dict[str, object]:
    """The checksum and the file stamp by which a record tells its weights; raises UserError."""
    return {STAMP: file_stamp(folder), CHECKPOINT: sha256_of(folder)}


def require_unchanged(folder: str | Path, known: Mapping[str, object]) -> None:
    """Raises UserError if a run has saved other weights since `identify` returned `known`."""
    if file_stamp(folder) != known[STAMP]:
        raise UserError(
            f"{folder} saved new weights while it was read, as it is being trained; write the "
            "command again"
        )


@dataclass(frozen=True)
class CurrentWeights:
    """The weights that a run has now, to be compared with those that a record was measured on.

    Their file is read only if its name, size and time are not those of the record.
    """

    folder: str | Path

    @cached_property
    def file_stamp(self) -> dict[str, object] | None:
        """The stamp of their file; None if the weights are gone."""
        try:
            return file_stamp(self.folder)
        except UserError:
            return None

    def match(self, record: Mapping[str, object]) -> bool:
        """Whether `record` was measured on these weights: by file stamp, else by sha256.

        False if the weights are gone.
        """
        if self.file_stamp is None:
            return False
        return record.get(STAMP) == self.file_stamp or record.get(CHECKPOINT) == self.sha256

    @cached_property
    def sha256(self) -> str:
        """The sha256 of their file."""
        return sha256_of(self.folder)
