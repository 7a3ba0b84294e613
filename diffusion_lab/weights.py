"""The weights of a trained denoiser: in the checkpoint of a run, or exported from it."""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_lab import checkpoints
from diffusion_lab.errors import UserError

EXPORTED = "model.safetensors"  # in the folder of an export
PREFIX = "denoiser."  # of the denoiser's weights in a checkpoint
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
    with file_of(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
