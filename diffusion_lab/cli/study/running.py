"""Runs the jobs of a study that its files lack, and tunes what its stages tune."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf

from diffusion_lab.analysis.status import PLAN
from diffusion_lab.cli.study.choosing import Tried, average, best, beyond, result, written
from diffusion_lab.cli.study.document import ARMS, ON_RUNS, SEEDS, TRAINS, Choice, Settings, slug
from diffusion_lab.cli.study.jobs import CHOOSE, Jobs, StudyJob, first_values, several
from diffusion_lab.cli.study.processes import Ended, Processes
from diffusion_lab.common.files import add_to_json, read_json, write_json
from diffusion_lab.common.formats import duration
from diffusion_lab.common.messages import console, say
from diffusion_lab.runs.files import SUMMARY, read_config
from diffusion_lab.runs.progress import is_locked
from diffusion_lab.training.tuned import has_diverged

RECORDS = "jobs"  # folder in that of a study: how jobs ended that leave no run folder
BETWEEN_LINES = 60.0  # seconds between two lines on how far a study has come


class Records:
    """The jobs of a study and how they ended, by the files in its folder."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs

    def path(self, job: StudyJob) -> Path:
        """The place that shows how a job ended: what it makes, or a record of its own."""
        return job.made if leaves(job) else self.jobs.root / RECORDS / f"{slug(job.title)}.json"

    def done(self, job: StudyJob) -> bool:
        """Whether a job need not be run; one that reads others is run again after them."""
        if job.command in TRAINS:
            return bool(read_json(job.made / SUMMARY).get("finished"))
        if job.command == "train-extractor":
            return job.made.is_file()
        if job.command == CHOOSE:
            found = read_json(job.made).get(job.label) or {}
            asked = self.asked(job).items()
            return bool(found.get("chosen")) and all(found.get(k, v) == v for k, v in asked)
        record = read_json(self.path(job))
        return record.get("arguments") == job.arguments and self.time(job) >= max(
            map(self.time, job.needs), default=0.0
        )

    def asked(self, job: StudyJob) -> dict[str, Any]:
        """The metric, values, seeds, samples and images that a choice is made of."""
        stage = self.jobs.study.stages[job.stage]
        assert stage.choice is not None
        return {
            "metric": stage.choice.metric,
            "values": several(stage),
            "seeds": [int(seed) for seed in stage.axes[SEEDS]],
            "trials": stage.choice.trials,
            "grow": stage.choice.grow,
            "num_samples": stage.choice.num_samples,
            "measure": stage.choice.measure,
            "images": self.jobs.trials(job, {})[0].settings.get("budget.images"),
        }

    def is_edited(self, job: StudyJob) -> bool:
        """Whether a training is done that was begun with other words."""
        summary = read_json(job.made / SUMMARY) if job.command in TRAINS else {}
        other = summary.get("finished") and summary.get("overrides") != job.arguments
        return bool(other) and all(map(self.done, job.needs))

    def is_outdated(self, job: StudyJob) -> bool:
        """Whether a training is done with other values than those that its stage now chooses."""
        if job.command not in TRAINS:
            return False
        chosen = [
            (read_json(need.made).get(need.label) or {}).get("chosen")
            for need in job.needs
            if need.command == CHOOSE and self.time(need) > self.time(job)
        ]
        used = OmegaConf.select(read_config(job.made), "tuning.chosen") if chosen else None
        return any(each != used for each in chosen)

    def is_open(self, trial: StudyJob) -> bool:
        """Whether a trial has neither finished nor diverged."""
        return not self.done(trial) and not has_diverged(trial.made)

    def time(self, job: StudyJob) -> float:
        """When a job ended, in seconds since 1970; 0 if it has not."""
        path = job.made / SUMMARY if job.command in TRAINS else self.path(job)
        return path.stat().st_mtime if path.is_file() else 0.0

    def write_plan(self) -> None:
        """Leaves the plan of the study where `status` finds it."""
        jobs = [
            {
                "stage": job.stage,
                "arm": job.point.get(ARMS, ""),
                "trains": job.command in TRAINS,
                "of": job.label if job.command == CHOOSE else None,
                "made": os.path.relpath(self.path(job), self.jobs.root),
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

    def measured(self, trial: StudyJob) -> dict[str, float] | None:
        """The metrics of a trial's evaluation, on SLURM of the last one; None if it has none."""
        if (job := self.jobs.measurement(trial)) is None:
            return None
        found = read_json(self.path(job)).get("result")
        if found is None:
            files = (trial.made / "evaluations").glob("*.json")
            last = max(files, key=lambda file: file.stat().st_mtime, default=None)
            found = read_json(last).get("metrics") if last else None
        return found or {}

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


Steps = Iterator[list[StudyJob]]  # what a job runs, each list after the one before it


class Schedule:
    """Jobs in their order, of which each begins once those of them that it needs have ended.

    A measurement of a run waits for earlier comparisons, too, which would read it.
    """

    def __init__(self, jobs: Sequence[StudyJob], steps: Callable[[StudyJob], Steps]):
        self.waiting, self.steps = list(jobs), steps
        self.begun: dict[str, tuple[Steps, set[str]]] = {}  # the set: what a job now waits for
        self.before = {job.title: {need.title for need in job.needs} for job in jobs}
        for place, job in enumerate(jobs):
            if job.command in ON_RUNS:
                self.before[job.title] |= {each.title for each in jobs[:place] if each.paths}

    @property
    def lasts(self) -> bool:
        """Whether a job has not ended."""
        return bool(self.waiting or self.begun)

    def ready(self) -> Iterator[StudyJob]:
        """The jobs that can run now, and could not before."""
        while True:
            coming = {job.title for job in self.waiting} | self.begun.keys()
            for job in list(self.waiting):
                if coming.isdisjoint(self.before[job.title]):
                    self.waiting.remove(job)
                    self.begun[job.title] = self.steps(job), set()
            idle = [title for title, (_, waits) in self.begun.items() if not waits]
            if not idle:
                return
            for title in idle:
                steps, waits = self.begun[title]
                if (step := next(steps, None)) is None:
                    del self.begun[title]
                else:
                    waits |= {each.title for each in step}
                    yield from step

    def ended(self, job: StudyJob) -> None:
        """Takes note that one of `ready` has ended."""
        for _, waits in self.begun.values():
            waits.discard(job.title)


@dataclass
class Runner:
    """Runs jobs in processes; `wanted` are all that this command should have done at its end.

    `failed` has a sentence for each job that failed, and `blocked` for each that lacks what it
    needs, by their titles.
    """

    records: Records
    processes: Processes
    wanted: Sequence[StudyJob]
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)  # what failed before it had a run folder
    elsewhere: list[str] = field(default_factory=list)
    said: float = field(default_factory=time.monotonic)  # when the last line was said

    def run(self) -> None:
        """Runs what is not done, of earlier stages first; one that fails does not stop others."""
        stages, schedule = list(self.records.jobs.study.stages), Schedule(self.wanted, self.steps)
        ready: list[StudyJob] = []
        # a single job shows its own progress
        rewritten = console.is_terminal and self.processes.count > 1
        with console.status("") if rewritten else nullcontext() as line:
            while schedule.lasts:
                ready += schedule.ready()
                ready.sort(key=lambda job: stages.index(job.stage))
                if ready and self.processes.room:
                    self.start(ready.pop(0), schedule)
                    continue
                if line:
                    line.update(self.progress())
                elif self.processes.count > 1 and time.monotonic() >= self.said + BETWEEN_LINES:
                    self.said = time.monotonic()
                    say(self.progress())
                for ended in self.processes.ended(BETWEEN_LINES):
                    self.note(ended)
                    schedule.ended(ended.job)

    def steps(self, job: StudyJob) -> Steps:
        """Runs a job unless it is done; of one that tunes, its trials."""
        if self.records.done(job):
            if self.records.is_outdated(job):
                self.failed[job.title] = (
                    f"{job.made} was trained with other values than are chosen now; move it away, "
                    f"or write name={self.records.jobs.study.name}_2 for a separate study"
                )
            return
        if not self.possible(job):
            return
        if job.command == CHOOSE:
            yield from self.tuning(job)
        else:
            yield [job]

    def tuning(self, job: StudyJob) -> Steps:
        """Runs trials until the best is inside their grid, and writes what is best."""
        records, jobs = self.records, self.records.jobs
        stage = jobs.study.stages[job.stage]
        assert stage.choice is not None
        new, grown, tried = first_values(stage, job.name), 0, list[Tried]()
        ends: list[Settings] = []  # values out of their keys' ranges
        while new:
            by_values = [(values, jobs.trials(job, values)) for values in new]
            trials = [trial for _, each in by_values for trial in each]
            yield [each for each in trials if records.is_open(each) and self.possible(each)]
            if grown:  # else it is a mistake in the study
                for values, own in by_values:
                    if any(trial.title in self.refused for trial in own):
                        ends.append(values)
                        self.end_grid(job, values, own)
                by_values = [each for each in by_values if each[0] not in ends]
                trials = [trial for _, each in by_values for trial in each]
            trained = filter(records.done, trials)
            measured = [each for trial in trained if (each := jobs.measurement(trial))]
            yield [each for each in measured if not records.done(each)]
            unfinished = [each.title for each in trials if records.is_open(each)]
            unfinished += [each.title for each in measured if not records.done(each)]
            if unfinished:
                self.failed[job.title] = f"it needs {unfinished[-1]}, which is not done"
                return
            for values, own in by_values:
                metric, by = stage.choice.metric, records.measured
                results = {each.point[SEEDS]: result(each, metric, by(each)) for each in own}
                tried.append({"values": values, "results": results})
            new = beyond(tried, stage.choice.metric) if grown < stage.choice.grow else []
            new = [values for values in new if values not in ends]
            grown += 1
            for values in new:
                say(f"{job.title}: the best value is at an end, trying {written(values)}")
        self.choose(job, stage.choice, tried, ends)

    def end_grid(self, job: StudyJob, values: Settings, own: Sequence[StudyJob]) -> None:
        """Takes the refusal of values beyond a grid as its end."""
        for trial in own:
            if trial.title in self.refused:
                self.failed.pop(trial.title, None)
        say(f"{job.title}: {written(values)} is refused, so its grid ends here")

    def choose(
        self, job: StudyJob, choice: Choice, tried: list[Tried], ends: Sequence[Settings]
    ) -> None:
        """Writes what was tried and what is best, for the trainings that need it."""
        stage, found = self.records.jobs.study.stages[job.stage], best(tried, choice.metric)
        trial = self.records.jobs.trials(job, {})[0].settings
        seconds = trial.get("budget.seconds")
        record = {
            "chosen": found and found["values"],
            "tried": tried,
            **self.records.asked(job),
            "overrides": [f"budget.seconds={seconds}"] if seconds else [],
            "of": [key for axis, name in job.point.items() for key in stage.axes[axis][name]],
        }
        job.made.parent.mkdir(parents=True, exist_ok=True)
        add_to_json(job.made, {job.label: record})
        if found is None:
            self.failed[job.title] = f"no trial has a finite {choice.metric}"
            return
        say(f"{job.title}: {written(found['values'])}, {choice.metric} {average(found):.4g}")
        if any(each not in ends for each in beyond(tried, choice.metric)):
            say(f"{job.title}: this value is at an end of its grid; widen it, or raise grow")

    def possible(self, job: StudyJob) -> bool:
        """Whether all that a job needs is done; of runs to compare, whether some are."""
        missing = [each for each in job.needs if not self.records.done(each)]
        if missing and not (job.paths and len(missing) < len(job.needs)):
            self.blocked[job.title] = f"it needs {missing[0].title}, which is not done"
            return False
        return True

    def start(self, job: StudyJob, schedule: Schedule) -> None:
        """Starts a job, unless another process trains it."""
        if job.command in TRAINS and is_locked(job.made):
            self.elsewhere.append(job.title)
            schedule.ended(job)
            say(f"{job.title} is being trained by another process")
        else:
            say(f"Starting {job.title}")
            self.processes.start(job)

    def progress(self) -> str:
        """The line on how far the study has come: what is done, running and left, and the time."""
        left, running = self.records.left(self.wanted), self.processes.running.values()
        spent = sum(time.monotonic() - begun for _, _, begun in running)
        seconds = (self.records.time_left(left) or 0) - spent
        to_go = f", about {duration(seconds / self.processes.count)} to go" if seconds > 0 else ""
        done = sum(len(self.records.jobs.first_of(job)) for job in self.wanted) - len(left)
        wait = max(0, len(left) - len(running))
        return f"{done} done, {len(running)} running, {wait} left{to_go}"

    def note(self, ended: Ended) -> None:
        """Takes note of how a job ended, and says how far the study has come."""
        job = ended.job
        if ended.diverged and job.command == "evaluate":
            self.records.note(job, ended.seconds, {})  # it would fail again
        if ended.code:
            self.failed[job.title] = ended.error
            if ended.code == 2 and not job.made.exists():
                self.refused.add(job.title)
            say(f"Failed: {job.title}: {ended.error}")
            return
        if job.command not in (*TRAINS, "train-extractor"):
            self.records.note(job, ended.seconds, ended.result)
        say(f"Done: {job.title} in {duration(ended.seconds)}; {self.progress()}")
