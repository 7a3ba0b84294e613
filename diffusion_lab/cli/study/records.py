"""The jobs of a study that are done, by its files, and how long the others will take."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from diffusion_lab.analysis.status import PLAN
from diffusion_lab.cli.study.document import ARMS, TRAINS, slug
from diffusion_lab.cli.study.jobs import CHOOSE, Jobs, StudyJob
from diffusion_lab.cli.study.values import several
from diffusion_lab.common.files import read_json, write_json
from diffusion_lab.runs.files import SUMMARY

RECORDS = "jobs"  # folder in that of a study: how jobs ended that leave no run folder


class Records:
    """The jobs of a study and how they ended, by the files in its folder."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs

    def path(self, job: StudyJob) -> Path:
        """The file that says how a job ended which trains nothing."""
        return self.jobs.root / RECORDS / f"{slug(job.title)}.json"

    def done(self, job: StudyJob) -> bool:
        """Whether a job need not be run; one that reads others is run again after them."""
        if job.command in TRAINS:
            return bool(read_json(job.made / SUMMARY).get("finished"))
        if job.command == "train-extractor":
            return job.made.is_file()
        if job.command == CHOOSE:
            found = read_json(job.made).get(job.label) or {}
            grids = several(self.jobs.study.stages[job.stage])
            return bool(found.get("chosen")) and found.get("values") == grids
        record = read_json(self.path(job))
        return record.get("arguments") == job.arguments and self.time(job) >= max(
            map(self.time, job.needs), default=0.0
        )

    def time(self, job: StudyJob) -> float:
        """When a job ended, in seconds since 1970; 0 if it has not."""
        made = job.made / SUMMARY if job.command in TRAINS else job.made
        path = made if leaves(job) else self.path(job)
        return path.stat().st_mtime if path.is_file() else 0.0

    def write_plan(self) -> None:
        """Leaves the plan of the study where `status` finds it."""
        jobs = [
            {
                "stage": job.stage,
                "arm": job.point.get(ARMS, ""),
                "trains": job.command in TRAINS,
                "of": job.label if job.command == CHOOSE else None,
                "made": os.path.relpath(
                    job.made if leaves(job) else self.path(job), self.jobs.root
                ),
            }
            for job in self.jobs.all
        ]
        self.jobs.root.mkdir(parents=True, exist_ok=True)
        write_json(self.jobs.root / PLAN, {"question": self.jobs.study.question, "jobs": jobs})

    def note(self, job: StudyJob, seconds: float, result: object) -> None:
        """Records that a job which trains nothing is done."""
        path = self.path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"arguments": job.arguments, "seconds": seconds, "result": result})

    def answer(self, job: StudyJob) -> str | None:
        """The sentence by which a comparison that is done answers its question."""
        result = read_json(self.path(job)).get("result")
        verdicts = list(result.get("verdict", {}).values()) if isinstance(result, dict) else []
        return verdicts[0] if verdicts else None

    def left(self, jobs: Sequence[StudyJob]) -> list[StudyJob]:
        """The jobs that are not done, with the first trials of those that tune in their place."""
        return [
            each
            for job in jobs
            if not self.done(job)
            for each in self.jobs.first_of(job)
            if not self.done(each)
        ]

    def count(self, jobs: Sequence[StudyJob]) -> int:
        """The number of jobs, with the first trials of those that tune in their place."""
        return sum(len(self.jobs.first_of(job)) for job in jobs)

    def time_left(self, jobs: Sequence[StudyJob]) -> float | None:
        """How long jobs will take, one after another; None if that is known of none of them."""
        rates: dict[str | None, list[float]] = {}
        for each in (run for job in self.jobs.all for run in self.jobs.first_of(job)):
            summary = read_json(each.made / SUMMARY) if each.command in TRAINS else {}
            images, seconds = summary.get("images_seen"), summary.get("wall_seconds")
            if images and seconds and summary.get("finished"):
                rates.setdefault(each.point.get(ARMS), []).append(seconds / images)
        known = list(filter(None, (self._seconds(job, rates) for job in jobs)))
        return sum(known) if known else None

    def _seconds(self, job: StudyJob, rates: dict[str | None, list[float]]) -> float | None:
        """How long a job will take, by the seconds of an image in each arm, or by its stage."""
        if seconds := job.settings.get("budget.seconds"):
            return float(seconds)
        if job.command in TRAINS:
            of_all = [rate for each in rates.values() for rate in each]
            own, images = rates.get(job.point.get(ARMS), of_all), job.settings.get("budget.images")
            return images * mean(own) if images and own else None
        took = [read_json(self.path(each)).get("seconds") for each in self.jobs.of(job.stage)]
        return mean(known) if (known := list(filter(None, took))) else None


def leaves(job: StudyJob) -> bool:
    """Whether what a job makes shows that it is done."""
    return job.command in (*TRAINS, CHOOSE, "train-extractor")
