"""The state of each run: from its folder, the record of its sweep, and SLURM's queue."""

from dataclasses import dataclass
from pathlib import Path

from diffusion_lab.analysis.status.found import Found, Planned
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute import slurm
from diffusion_lab.compute.slurm import Queued
from diffusion_lab.runs.progress import (
    Progress,
    State,
    failure_of,
    progress_of,
    started_since,
    state_of,
)

Queue = dict[str, Queued]


@dataclass(frozen=True)
class Row:
    """The state of a run."""

    run: str  # its folder, or the overrides of a job whose folder is not known yet
    state: State
    progress: Progress
    job: str | None  # its id on SLURM
    reason: str | None  # why it waits, failed or was killed
    log: str | None  # of a SLURM job that has begun

    @property
    def parent(self) -> str:
        """The folder that the run is in."""
        return str(Path(self.run).parent)


def rows_of(found: Found) -> tuple[list[Row], str | None]:
    """The rows of all runs, and why SLURM did not answer, or None."""
    signed = {key: read_json(folder / slurm.RECORD) for key, folder in found.runs.items()}
    own = {key: record.get("job") for key, record in signed.items()}  # SLURM jobs that began runs
    queue, silent = asked([*own.values(), *(job.slurm for job in found.jobs)])
    newest = {job.folder.resolve(): job for job in found.jobs if job.folder}
    rows = [row_of(folder, newest.get(key), own[key], queue) for key, folder in found.runs.items()]
    to_come = [job for key, job in newest.items() if key not in found.runs]
    to_come += [job for job in found.jobs if not job.folder and job.slurm not in own.values()]
    rows += filter(None, (row_of_job(job, queue, silent) for job in to_come))
    return sorted(rows, key=lambda row: (row.parent, row.run)), silent


def asked(jobs: list[str | None]) -> tuple[Queue, str | None]:
    """Asks SLURM for jobs; returns those it knows, and why it did not answer, or None."""
    try:
        return slurm.queue(filter(None, jobs)), None
    except UserError as error:
        return {}, str(error)


def row_of(folder: Path, job: Planned | None, own: str | None, queue: Queue) -> Row:
    """The row of a run that has begun; `job` is of the last sweep that it belongs to."""
    state, reason = state_of(folder), None
    ids = [each for each in (job and job.slurm, own) if each]
    held = next((each for each in ids if each in queue), ids[0] if ids else None)
    queued = queue.get(held or "")
    if state not in (State.FINISHED, State.RUNNING):
        if given := state_of_job(job, queued):
            state, reason = given
        elif job and job.failed and not started_since(folder, job.ended_at):
            state, reason = State.FAILED, job.outcome["error"]
        else:
            reason = failure_of(folder) or word_of(queued)
    log = job.log if job else None
    return Row(str(folder), state, progress_of(folder, state), held, reason, log)


def row_of_job(job: Planned, queue: Queue, silent: str | None) -> Row | None:
    """The row of a job whose run has not begun; None if its run has ended, and is gone."""
    queued = queue.get(job.slurm or "")
    if given := state_of_job(job, queued):
        state, reason = given
    elif job.failed:
        state, reason = State.FAILED, job.outcome["error"]
    elif job.outcome:
        return None
    elif job.slurm and silent:
        state, reason = State.UNKNOWN, silent
    else:
        state, reason = State.FAILED if job.log else State.NOT_STARTED, word_of(queued)
    return Row(job.name, state, Progress(), job.slurm, reason, job.log)


def state_of_job(job: Planned | None, queued: Queued | None) -> tuple[State, str | None] | None:
    """The state of a job that is still to be run, with its reason; None if it is not."""
    if queued and queued.waits:
        return State.QUEUED, queued.reason
    if queued and queued.runs:
        return State.RUNNING, None
    if job and not job.slurm and not job.outcome and job.record.is_alive:
        return State.QUEUED, None
    return None


def word_of(queued: Queued | None) -> str | None:
    """The reason that SLURM gives for the end of a job, if it still knows it."""
    return f"SLURM says {queued.state}" if queued and queued.state != "COMPLETED" else None
