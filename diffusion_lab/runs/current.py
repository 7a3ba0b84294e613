"""The file of a run's weights, and whether a record was measured on it; without reading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import published
from diffusion_lab.runs.files import LAST, PREVIOUS

EXPORTED = "model.safetensors"  # in the folder of an export
CHECKPOINT, STAMP = "checkpoint", "weights_file"  # keys of records: sha256 and file stamp


def file_of(folder: str | Path) -> Path:
    """The exported weights of a run, or its newest intact checkpoint; may raise UserError."""
    exported = Path(folder) / EXPORTED
    if exported.is_file():
        return exported
    from diffusion_lab.runs import checkpoints  # late: it waits for torch

    return checkpoints.newest_intact(folder)


def sha256_of(folder: str | Path) -> str:
    """The sha256 of the file with a run's weights."""
    return hashing.of_file(file_of(folder))


def file_stamp(folder: str | Path, checkpoint: Path | None = None) -> dict[str, object]:
    """The name, size and time of the file with a run's weights, or of one of its checkpoints.

    Raises UserError if it is gone.
    """
    there = _there(folder) if checkpoint is None else [checkpoint] * checkpoint.is_file()
    path = there[0] if there else file_of(folder)  # raises, saying what is missing
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _there(folder: str | Path) -> list[Path]:
    """The files that may hold a run's weights and are there, the one that counts first."""
    return [path for name in (EXPORTED, LAST, PREVIOUS) if (path := Path(folder) / name).is_file()]


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
    checkpoint: Path | None = None  # one of the run's in place of the newest

    @cached_property
    def file_stamp(self) -> dict[str, object] | None:
        """The stamp of the weights' file; None if it is gone."""
        there = self.checkpoint or _there(self.folder)
        return file_stamp(self.folder, self.checkpoint) if there else None

    def match(self, record: Mapping[str, object]) -> bool:
        """Whether `record` is of these weights, by file stamp or else sha256; False if unknown."""
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
        return hashing.of_file(self.checkpoint or file_of(self.folder))
