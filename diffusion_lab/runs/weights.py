"""The weights of a trained denoiser: in the checkpoint of a run, or exported from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import averages, checkpoints, migrate, published
from diffusion_lab.runs.averages import NO_AVERAGE
from diffusion_lab.runs.checkpoints import AVERAGES, TRAINED

EXPORTED = "model.safetensors"  # in the folder of an export
# start the names of the weights of the network that draws, in a checkpoint: of a denoiser, or of a
# model of another family
PREFIX, OTHER = "denoiser.", "model."
CHECKPOINT, STAMP = "checkpoint", "weights_file"  # keys of records: sha256 and file stamp


@dataclass(frozen=True)
class WeightsChoice:
    """The weights of a run, or of an export, that are asked for.

    `average` is NO_AVERAGE, the name of an average that the run kept or that was made of it, or
    None for the one that it evaluates, which is NO_AVERAGE if it kept none. `checkpoint` is an
    intact one, or None for the newest.
    """

    folder: Path
    average: str | None = None
    checkpoint: Path | None = None


def file_of(folder: str | Path) -> Path:
    """The file of a run's weights: the exported one, or its newest intact checkpoint.

    Raises UserError if there is neither.
    """
    exported = Path(folder) / EXPORTED
    return exported if exported.is_file() else checkpoints.newest_intact(folder)


def load_weights(choice: WeightsChoice) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Loads the weights of the network that draws; returns them and the facts of their export.

    Raises UserError if there is no such average, or if the weights are missing or damaged.
    """
    folder, average = choice.folder, choice.average
    if (folder / EXPORTED).is_file():  # an export or an import
        if average is not None:
            raise UserError(
                f"average={average} cannot be chosen in {folder}, an export, which has one set of "
                "weights; leave average out, or export the run again with it"
            )
        return read(folder / EXPORTED, "export the run again"), facts_of(folder)
    path = choice.checkpoint or checkpoints.newest_intact(folder)
    checkpoints.say_if_older(folder, path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    state, kept = content["state_dict"], content.get(AVERAGES, {})
    step = content["global_step"]
    facts = {"average": average or "evaluated", "step": str(step), "run": folder.resolve().name}
    if average == NO_AVERAGE:
        state = content.get(TRAINED, state)
    elif average in kept:
        state = state | kept[average]
    elif average is not None:
        made = averages.find(folder, average, step, [NO_AVERAGE, *kept])
        tensors = read(made / EXPORTED, "make the average again")
        return tensors, facts | {"step": str(averages.step_of(made))}
    weights = {
        migrate.today(name.removeprefix(prefix)): value
        for prefix in (PREFIX, OTHER)
        for name, value in state.items()
        if name.startswith(prefix)
    }
    return weights, facts


def load_into(network: nn.Module, state: dict[str, Tensor], folder: str | Path) -> None:
    """Gives a network the weights of the run `folder`; raises UserError if they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {folder} do not fit its configuration: they are of another model"
        ) from error


def read(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads a file of weights; if it is damaged, raises UserError, which ends with `remedy`."""
    try:
        found = safetensors.torch.load_file(path)
        return {migrate.today(name): value for name, value in found.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def facts_of(folder: str | Path) -> dict[str, str]:
    """The facts that an export or an import keeps beside its weights."""
    with safe_open(Path(folder) / EXPORTED, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != "format"}


def sha256_of(folder: str | Path) -> str:
    """The sha256 of the file with a run's weights."""
    return hashing.of_file(file_of(folder))


def file_stamp(folder: str | Path, checkpoint: Path | None = None) -> dict[str, object]:
    """The name, size and time of the file with a run's weights, or of one of its checkpoints.

    Raises UserError if it is gone.
    """
    names = (EXPORTED, checkpoints.LAST, checkpoints.PREVIOUS)
    candidates = [Path(folder) / name for name in names] if checkpoint is None else [checkpoint]
    there = [path for path in candidates if path.is_file()]
    path = there[0] if there else file_of(folder)  # raises, saying what is missing
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def identify(folder: str | Path, checkpoint: Path | None = None) -> dict[str, object]:
    """The checksum and file stamp of a run's weights, as kept in records; may raise UserError.

    `checkpoint` is one of the run's, by default the newest.
    """
    sha256 = hashing.of_file(checkpoint or file_of(folder))
    return {STAMP: file_stamp(folder, checkpoint), CHECKPOINT: sha256}


def require_unchanged(
    folder: str | Path, known: Mapping[str, object], checkpoint: Path | None = None
) -> None:
    """Raises UserError if a run has saved other weights since `identify` returned `known`."""
    if file_stamp(folder, checkpoint) != known[STAMP]:
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

        False if the weights are unknown.
        """
        if not self.known:
            return False
        stamped = self.file_stamp is not None and record.get(STAMP) == self.file_stamp
        return stamped or record.get(CHECKPOINT) == self.sha256

    @property
    def known(self) -> bool:
        """Whether the weights are there, or the run is published with their checksum."""
        return self.file_stamp is not None or self.sha256 is not None

    @cached_property
    def sha256(self) -> str | None:
        """The sha256 of the weights' file; that of a published run's, which has none; or None."""
        if self.file_stamp is None:
            return published.facts_of(self.folder).get(published.WEIGHTS)
        return sha256_of(self.folder)
