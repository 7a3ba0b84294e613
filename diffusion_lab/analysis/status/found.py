"""Finds the runs below some paths, and the jobs of sweeps that are to be runs there."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion_lab.runs import sweep_record
from diffusion_lab.runs.search import walk
from diffusion_lab.runs.sweep_record import FAILED, Record


@dataclass(frozen=True)
class Planned:
    """A job of a sweep, and its number there."""

    record: Record
    number: int

    @property
    def folder(self) -> Path | None:
        """The folder of the job's run; None if that is known only once the run begins."""
        return self.record.jobs[self.number].folder

    @property
    def name(self) -> str:
        return str(self.folder or " ".join(self.record.jobs[self.number].overrides))

    @property
    def slurm(self) -> str | None:
        """The job's id on SLURM; None if it is run here, or is not submitted yet."""
        return self.record.jobs[self.number].slurm

    @cached_property
    def outcome(self) -> dict:
        """How the job ended; empty if it has not."""
        return self.record.outcome(self.number)

    @property
    def failed(self) -> bool:
        return self.outcome.get("status") == FAILED

    @property
    def ended_at(self) -> float:
        return self.record.ended_at(self.number)

    @property
    def log(self) -> str | None:
        """The log of its SLURM job, once that has begun."""
        path = self.record.log(self.number)
        return str(path) if path else None


@dataclass(frozen=True)
class Found:
    """Run folders by their resolved paths, and jobs of sweeps, those of the oldest sweep first."""

    runs: dict[Path, Path]
    jobs: list[Planned]


def find(paths: Iterable[Path]) -> Found:
    """Finds runs and jobs at and below the paths; raises UserError if one does not exist."""
    runs: dict[Path, Path] = {}
    files_of_records: dict[Path, Path] = {}
    roots = [path.resolve() for path in paths]
    for path in paths:
        records = list((path.parent / sweep_record.FOLDER).glob("*.json"))  # if it is a run's
        for folder, is_run, _, files in walk(path):
            if is_run:
                runs.setdefault(folder.resolve(), folder)
            elif folder.name == sweep_record.FOLDER:
                records += folder.glob("*.json")
            elif sweep_record.ALONE in files:
                records.append(folder / sweep_record.ALONE)
        files_of_records |= {each.resolve(): each for each in records}
    jobs = []
    for file in sorted(files_of_records.values(), key=time_of):
        if record := sweep_record.read(file):
            jobs += [Planned(record, number) for number in range(len(record.jobs))]
    return Found(runs, [job for job in jobs if is_below(job.folder, roots)])


def time_of(record: Path) -> str:
    """The time in the name of a sweep, by which names are sorted."""
    return record.parent.name if record.name == sweep_record.ALONE else record.stem


def is_below(folder: Path | None, roots: Iterable[Path]) -> bool:
    """Whether a folder is at or below one of the paths, or may yet be."""
    return folder is None or any(folder.resolve().is_relative_to(root) for root in roots)
