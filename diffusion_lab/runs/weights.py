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
from diffusion_lab.runs.checkpoints import AVERAGES, TRAINED

EXPORTED = "model.safetensors"  # in the folder of an export
PREFIX = "denoiser."  # starts the names of the denoiser's weights in a checkpoint
CHECKPOINT, STAMP = "checkpoint", "weights_file"  # keys of records: sha256 and file stamp
NO_AVERAGE = "trained"  # in place of an average's name: the weights as the optimiser left them


def file_of(folder: str | Path) -> Path:
    """The file of a run's weights: the exported one, or its newest intact checkpoint.

    Raises UserError if there is neither.
    """
    exported = Path(folder) / EXPORTED
    return exported if exported.is_file() else checkpoints.newest_intact(folder)


def name_of(average: object) -> str:
    """The name of an average: its length or half-life as a number without zeros, or text as is."""
    return f"{average:.15g}" if isinstance(average, int | float) else str(average)


def load_weights(folder: str | Path, average: str | None = None) -> dict[str, Tensor]:
    """Loads the denoiser's weights: the average of that name, or the one that a run evaluates.

    Raises UserError if they are missing or damaged.
    """
    path = file_of(folder)
    if path.name != EXPORTED:
        return load_from_checkpoint(folder, average)[0]
    if average is not None:
        raise UserError(
            f"average={average} cannot be chosen in {folder}, an export, which has one set of "
            "weights; leave average out, or export the run again with it"
        )
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); export the run again") from error


def load_from_checkpoint(
    folder: str | Path, average: str | None = None
) -> tuple[dict[str, Tensor], int]:
    """Loads the denoiser's weights and the step from a run's newest intact checkpoint.

    `average` is NO_AVERAGE, the name of an average that the run kept, or None for the one that it
    evaluates, which is NO_AVERAGE if it kept none. Raises UserError if there is no such average, or
    if no checkpoint is intact.
    """
    path = checkpoints.newest_intact(folder)
    checkpoints.say_if_older(folder, path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state, kept = checkpoint["state_dict"], checkpoint.get(AVERAGES, {})
    if average == NO_AVERAGE:
        state = checkpoint.get(TRAINED, state)
    elif average is not None:
        if average not in kept:
            raise UserError(
                f"average={average} is not an average of {folder}; write one of "
                f"{', '.join([NO_AVERAGE, *kept])}"
            )
        state = state | kept[average]
    weights = {
        name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)
    }
    return weights, checkpoint["global_step"]


def sha256_of(folder: str | Path) -> str:
    """The sha256 of the file with a run's weights."""
    return hashing.of_file(file_of(folder))


def file_stamp(folder: str | Path) -> dict[str, object]:
    """The name, size and time of the file with a run's weights; raises UserError if it is gone."""
    names = (EXPORTED, checkpoints.LAST, checkpoints.PREVIOUS)
    there = [path for name in names if (path := Path(folder) / name).is_file()]
    path = there[0] if there else file_of(folder)  # raises, saying what is missing
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def identify(folder: str | Path) -> dict[str, object]:
    """The checksum and file stamp of a run's weights, as kept in records; may raise UserError."""
    return {STAMP: file_stamp(folder), CHECKPOINT: sha256_of(folder)}


def require_unchanged(folder: str | Path, known: Mapping[str, object]) -> None:
    """Raises UserError if a run has saved other weights since `identify` returned `known`."""
    if file_stamp(folder) != known[STAMP]:
        raise UserError(
            f"{folder} saved new weights while it was being read, because it is in training; "
            "repeat the command"
        )


@dataclass(frozen=True)
class CurrentWeights:
    """The current weights of a run, to compare with the weights that a record was measured on.

    The file is read only if its name, size or time differs from the record.
    """

    folder: str | Path

    @cached_property
    def file_stamp(self) -> dict[str, object] | None:
        """The stamp of the weights' file; None if it is gone."""
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
        """The sha256 of the weights' file."""
        return sha256_of(self.folder)
