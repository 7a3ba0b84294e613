"""Submits the jobs of a study to SLURM: all stages at once, each after those that it needs.

A job waits until those that it needs have ended, however they did (`afterany`), and then looks
at what came of them, so none stays in the queue for a job that has failed. A small job after the
trials of a tuning writes what is best; it trains the values that a grid grows by itself.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffusion_lab.cli.study.document import ARMS, TRAINS, slug
from diffusion_lab.cli.study.jobs import CHOOSE, StudyJob, present
from diffusion_lab.cli.study.running import Records, leaves
from diffusion_lab.cli.sweeps import first_job
from diffusion_lab.common.files import read_json, write_json
from diffusion_lab.common.messages import say
from diffusion_lab.compute import slurm
from diffusion_lab.runs import sweep_record

FILE = "slurm.json"  # in a study's folder: the SLURM jobs of its jobs, by their titles
PLACE = "submitted"  # folder in a study's with the logs of its SLURM jobs
SMALL = {"nodes": 1, "tasks_per_node": 1}  # of a job that trains and samples nothing


@dataclass(frozen=True)
class JobOnSlurm:
    """A command in a SLURM job, and what notes that it is done; a requeued job begins it again."""

    command: str
    arguments: list[str]
    note: Callable[[float], None] | None = None

    def __call__(self) -> None:
        from diffusion_lab.cli.program import execute

        begun = time.monotonic()
        execute(present(self.command, self.arguments))
        if self.note:
            self.note(time.monotonic() - begun)

    def checkpoint(self) -> Any:
        """The callable that submitit submits when the time of the job is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Submission:
    """The jobs that are submitted; `again` are the arguments of `study` without a launcher."""

    def __init__(
        self, records: Records, launcher: list[str], flags: Sequence[str], again: Sequence[str]
    ):
        self.records, self.flags, self.again = records, list(flags), list(again)
        cfg = first_job("train", self.flags, launcher)
        self.params: Any = OmegaConf.to_container(cfg.hydra.launcher)
        self.root = records.jobs.root
        known = read_json(self.root / FILE)
        queue = slurm.queue(known.values())
        held = {i for i, each in queue.items() if each.waits or each.runs}
        self.ids = {title: number for title, number in known.items() if number in held}

    def submit(self, jobs: Sequence[StudyJob]) -> None:
        """Submits the jobs of one stage that are neither done nor in the queue."""
        new = [j for j in jobs if not self.records.done(j) and j.title not in self.ids]
        choosers = [job for job in new if job.command == CHOOSE]
        trials = [t for job in choosers for t in self.records.jobs.first_of(job)]
        trials = [t for t in trials if not self.records.done(t) and t.title not in self.ids]
        self._send([job for job in new if job.command != CHOOSE] + trials, new)
        for arm in dict.fromkeys(job.point.get(ARMS) for job in choosers):
            own = [job for job in choosers if job.point.get(ARMS) == arm]  # a study chooses for all
            narrowed = [f"stages={own[0].stage}", *([f"arms={arm}"] if arm else [])]
            task = JobOnSlurm("study", [*self.again, *narrowed])
            befores = [
                each for job in own for each in (*job.needs, *self.records.jobs.first_of(job))
            ]
            ids, _ = self._array([task], own[0].stage, SMALL, self._ids(befores))
            self.ids |= {job.title: ids[0] for job in own}
        write_json(self.root / FILE, self.ids)

    def _send(self, jobs: list[StudyJob], stage: Sequence[StudyJob]) -> None:
        if not jobs:
            return
        tasks = [
            JobOnSlurm(
                job.command,
                [*self.flags, *job.arguments],
                None if leaves(job) else partial(self.records.note, job, result=None),
            )
            for job in jobs
        ]
        trains = jobs[0].command in TRAINS
        small = not trains and not jobs[0].point
        after = self._ids(need for job in stage for need in job.needs)
        ids, place = self._array(tasks, jobs[0].stage, SMALL if small else {}, after)
        self.ids |= {job.title: number for job, number in zip(jobs, ids, strict=True)}
        if trains:
            rows = [
                sweep_record.Job(job.arguments, job.made, number)
                for job, number in zip(jobs, ids, strict=True)
            ]
            sweep_record.write(place, self.root.name, rows)

    def _ids(self, jobs: Iterable[StudyJob]) -> set[str]:
        return {self.ids[job.title] for job in jobs if job.title in self.ids}

    def _array(
        self, tasks: list[JobOnSlurm], stage: str, changes: dict[str, Any], after: set[str]
    ) -> tuple[list[str], Path]:
        """Submits tasks; returns their SLURM jobs, and the folder with their logs."""
        place = self.root / PLACE / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug(stage)}"
        params = self.params | changes | {"name": f"{self.root.name}_{slug(stage)}"}
        params["submitit_folder"] = str(place / ".submitit" / "%j")
        if after:
            more = {"dependency": ":".join(["afterany", *sorted(after)])}
            params["additional_parameters"] = dict(params["additional_parameters"]) | more
        jobs = slurm.executor(params).submit_array(tasks)
        ids = [job.job_id for job in jobs]
        say(f"Submitted to SLURM: {stage}: {ids[0]}{f' to {ids[-1]}' if len(ids) > 1 else ''}")
        return ids, place
