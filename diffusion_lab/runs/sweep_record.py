"""The record of a sweep: of each job the run folder and the SLURM job, and how it ended.

A study keeps the records of its sweeps with its runs, in outputs/<study_name>/sweeps/<time>.json;
the record of another sweep is sweep.json in the sweep's own folder. How job 3 of a sweep ended is
in <sweep>/jobs/3.json. Paths in a record start from its folder, so a study can be moved.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion_lab.common.files import OUTPUTS, read_json, write_json
from diffusion_lab.runs.progress import is_locked

FOLDER, ALONE, OUTCOMES = "sweeps", "sweep.json", "jobs"
DONE, SKIPPED, FAILED = "trained", "already finished", "failed"


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its overrides, the run folder that a study gives it, and its SLURM job.

    `sweep` is the folder of the sweep that a record was read for, and `number` its place there.
    """

    overrides: list[str]
    folder: Path | None = None  # None if it is known only once the run begins
    slurm: str | None = None  # None if it is run here, or is not submitted yet
    sweep: Path = Path()
    number: int = 0

    @property
    def waits_here(self) -> bool:
        """Whether its sweep, which runs on a machine that shares this disk, has yet to run it."""
        return not self.slurm and not self.outcome and is_locked(self.sweep)

    @property
    def _outcome(self) -> Path:
        return self.sweep / OUTCOMES / f"{self.number}.json"

    @cached_property
    def outcome(self) -> dict:
        """How the job ended, an empty dictionary if that is not known."""
        return read_json(self._outcome)

    @property
    def ended_at(self) -> float:
        """The time at which the job ended, in seconds since 1970; raises OSError if unknown."""
        return self._outcome.stat().st_mtime

    @property
    def log(self) -> str | None:
        """The log of the first task of its SLURM job, if that has begun."""
        found = self.sweep.glob(f".submitit/{self.slurm}/{self.slurm}_0_log.out")
        return next(map(str, found), None)


def path_of(sweep: Path, study: str | None) -> Path:
    """The file of a sweep's record."""
    return OUTPUTS / study / FOLDER / f"{sweep.name}.json" if study else sweep / ALONE


def write(sweep: Path, study: str | None, jobs: Sequence[Job]) -> None:
    """Writes the record of a sweep that begins now."""
    path = path_of(sweep, study)
    path.parent.mkdir(parents=True, exist_ok=True)
    folders = [each.folder and os.path.relpath(each.folder, path.parent) for each in jobs]
    rows = [
        {"overrides": job.overrides, "folder": folder, "slurm": job.slurm}
        for job, folder in zip(jobs, folders, strict=True)
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


def read(path: Path) -> list[Job]:
    """Reads the jobs of a record; there are none if the file is damaged."""
    found = read_json(path)
    try:
        sweep = _joined(path, found["sweep"])
        jobs = []
        for number, row in enumerate(found["jobs"]):
            folder = row["folder"] and _joined(path, row["folder"])
            jobs.append(Job(row["overrides"], folder, row["slurm"], sweep, number))
        return jobs
    except (KeyError, TypeError):
        return []


def _joined(record: Path, name: str) -> Path:
    """The path that a record names, without `..`."""
    return Path(os.path.normpath(record.parent / name))


def of_study(study: Path) -> Iterator[list[Job]]:
    """Yields the jobs of each sweep in the folder of a study, those of the oldest first."""
    yield from filter(None, map(read, sorted((study / FOLDER).glob("*.json"))))


def note(sweep: str | Path, number: int, status: str, overrides: list[str], **more: str) -> None:
    """Saves the outcome of a job, and the overrides that run it alone."""
    folder = Path(sweep) / OUTCOMES
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{number}.json", {"status": status, "overrides": overrides} | more)


def outcomes(sweep: str | Path) -> list[dict]:
    """Reads the outcomes of the jobs, in order of their numbers."""
    files = sorted((Path(sweep) / OUTCOMES).glob("*.json"), key=lambda path: int(path.stem))
    return list(map(read_json, files))
