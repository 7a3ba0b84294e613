"""Runs the jobs of a study on this machine, stage by stage."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from diffusion_lab.cli.study.document import TRAINS
from diffusion_lab.cli.study.jobs import CHOOSE, StudyJob
from diffusion_lab.cli.study.processes import Ended, Processes
from diffusion_lab.cli.study.records import Records
from diffusion_lab.cli.study.tuning import Search
from diffusion_lab.common.formats import duration
from diffusion_lab.common.messages import console, say
from diffusion_lab.runs.progress import is_locked

BETWEEN_LINES = 60.0  # seconds between two lines on how far a study has come


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
    elsewhere: list[str] = field(default_factory=list)
    said: float = field(default_factory=time.monotonic)  # when the last line was said

    def run(self, jobs: Sequence[StudyJob]) -> None:
        """Runs the jobs of a stage that are not done."""
        left = [job for job in jobs if not self.records.done(job)]
        self.work([job for job in left if job.command != CHOOSE])
        self.tune([job for job in left if job.command == CHOOSE and self.possible(job)])

    def possible(self, job: StudyJob) -> bool:
        """Whether all that a job needs is done; of runs to compare, whether some are."""
        missing = [each for each in job.needs if not self.records.done(each)]
        if missing and not (job.paths and len(missing) < len(job.needs)):
            self.blocked[job.title] = f"it needs {missing[0].title}, which is not done"
            return False
        return True

    def work(self, jobs: Sequence[StudyJob]) -> None:
        """Runs jobs, several at once; one that fails does not stop the others."""
        waiting = [job for job in jobs if self.possible(job)]
        # a single job shows its own progress
        rewritten = console.is_terminal and self.processes.count > 1
        with console.status("") if rewritten else nullcontext() as line:
            while waiting or self.processes.running:
                while waiting and self.processes.room:
                    self.start(waiting.pop(0))
                if line:
                    line.update(self.progress())
                elif self.processes.count > 1 and time.monotonic() >= self.said + BETWEEN_LINES:
                    self.said = time.monotonic()
                    say(self.progress())
                for ended in self.processes.ended(BETWEEN_LINES):
                    self.note(ended)

    def start(self, job: StudyJob) -> None:
        """Starts a job, unless another process trains it."""
        if job.command in TRAINS and is_locked(job.made):
            self.elsewhere.append(job.title)
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
        done = self.records.count(self.wanted) - len(left)
        wait = max(0, len(left) - len(running))
        return f"{done} done, {len(running)} running, {wait} left{to_go}"

    def note(self, ended: Ended) -> None:
        """Takes note of how a job ended, and says how far the study has come."""
        job = ended.job
        if ended.code:
            self.failed[job.title] = ended.error
            say(f"Failed: {job.title}: {ended.error}")
            return
        if job.command not in (*TRAINS, "train-extractor"):
            self.records.note(job, ended.seconds, ended.result)
        say(f"Done: {job.title} in {duration(ended.seconds)}; {self.progress()}")

    def tune(self, choosers: Sequence[StudyJob]) -> None:
        """Runs trials at the same time for all, until the best values are inside their grids."""
        searches = [Search(self.records, job) for job in choosers]
        while any(search.new for search in searches):
            trials = [(search, trial) for search in searches for trial in search.trials()]
            self.work([trial for search, trial in trials if search.needs_run(trial)])
            trained = [trial for _, trial in trials if self.records.done(trial)]
            measured = filter(None, map(self.records.jobs.measurement, trained))
            self.work([each for each in measured if not self.records.done(each)])
            for search in searches:
                search.take()
        for search in searches:
            if why := search.end():
                self.failed[search.chooser.title] = why
