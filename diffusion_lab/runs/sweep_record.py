"""The record of a sweep: of each job the run folder and the SLURM job, and how it ended.

A study keeps the records of its sweeps with its runs, in outputs/<study_name>/sweeps/<time>.json;
the record of another sweep is sweep.json in the sweep's own folder. How job 3 of a sweep ended is
in <sweep>/jobs/3.json. Paths in a record start from its folder, so a study can be moved.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from diffusion_lab.common.files import OUTPUTS, read_json, write_json
from diffusion_lab.runs.progress import is_locked

FOLDER, ALONE, OUTCOMES = "sweeps", "sweep.json", "jobs"
DONE, SKIPPED, FAILED = "trained", "already finished", "failed"


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its overrides, the run folder that a study gives it, and its SLURM job."""

    overrides: list[str]
    folder: Path | None = None
    slurm: str | None = None


@dataclass(frozen=True)
class Record:
    """The record of a sweep, as it was read from a file."""

    sweep: Path
    jobs: list[Job]

    @cached_property
    def is_alive(self) -> bool:
        """Whether the command of the sweep is still running on a machine that shares this disk."""
        return is_locked(self.sweep)

    def outcome(self, number: int) -> dict:
        """How a job ended, an empty dictionary if that is not known."""
        return read_json(self.sweep / OUTCOMES / f"{number}.json")

    def ended_at(self, number: int) -> float:
        """The time at which a job ended, in seconds since 1970; raises OSError if it is unknown."""
        return (self.sweep / OUTCOMES / f"{number}.json").stat().st_mtime

    def log(self, number: int) -> Path | None:
        """The log of the first task of a job's SLURM job, if that has begun."""
        job = self.jobs[number].slurm
        found = self.sweep.glob(f".submitit/{job}/{job}_0_log.out")
        return next(found, None)


def path_of(sweep: Path, study: str | None) -> Path:
    """The file of a sweep's record."""
    return OUTPUTS / study / FOLDER / f"{sweep.name}.json" if study else sweep / ALONE


def write(sweep: Path, study: str | None, jobs: Sequence[Job]) -> None:
    """Writes the record of a sweep that begins now."""
    path = path_of(sweep, study)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(job) | {"folder": job.folder and os.path.relpath(job.folder, path.parent)}
        for job in jobs
    ]
    write_json(path, {"sweep": os.path.relpath(sweep, path.parent), "jobs": rows})


def add_slurm_jobs(sweep: Path, study: str | None, first: int, ids: Sequence[str]) -> None:
    """Adds the ids of SLURM jobs to a record; they are those of the jobs from `first` on."""
    path = path_of(sweep, study)
    record = read_json(path)
    if not record:
        return  # of a search, whose jobs are not known beforehand, or of a command without training
    for number, job in enumerate(ids, first):
        record["jobs"][number]["slurm"] = job
    write_json(path, record)


def read(path: Path) -> Record | None:
    """Reads a record; returns None if the file is damaged."""
    found = read_json(path)
    try:
        jobs = [
            Job(row["overrides"], row["folder"] and _joined(path, row["folder"]), row["slurm"])
            for row in found["jobs"]
        ]
        return Record(_joined(path, found["sweep"]), jobs)
    except (KeyError, TypeError):
        return None


def _joined(record: Path, name: str) -> Path:
    """The path that a record names, without `..`."""
    return Path(os.path.normpath(record.parent / name))


def of_study(study: Path) -> Iterator[Record]:
    """Yields the records in the folder of a study, the oldest first."""
    for path in sorted((study / FOLDER).glob("*.json")):
        if record := read(path):
            yield record


def note(sweep: str | Path, number: int, status: str, overrides: list[str], **more: str) -> None:
    """Saves the outcome of a job, and the overrides that run it alone."""
    folder = Path(sweep) / OUTCOMES
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{number}.json", {"status": status, "overrides": overrides} | more)


def outcomes(sweep: str | Path) -> list[dict]:
    """Reads the outcomes of the jobs, in order of their numbers."""
    files = sorted((Path(sweep) / OUTCOMES).glob("*.json"), key=lambda path: int(path.stem))
    return list(map(read_json, files))
