"""Shows the runs, sweeps and studies in folders: what is done, running, stopped or failed."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.common.files import read_json
from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import above, optional
from diffusion_lab.compute import slurm
from diffusion_lab.compute.slurm import Queued
from diffusion_lab.runs import sweep_record
from diffusion_lab.runs.progress import (
    Progress,
    State,
    failure_of,
    progress_of,
    started_since,
    state_of,
)
from diffusion_lab.runs.published import has_card
from diffusion_lab.runs.search import walk
from diffusion_lab.runs.sweep_record import FAILED, Job

Queue = dict[str, Queued]


def find(paths: Iterable[Path]) -> tuple[dict[Path, Path], list[Job]]:
    """Finds runs and jobs at and below the paths; raises UserError if one does not exist.

    Returns run folders by their resolved paths, and jobs, those of the oldest sweep first. The
    published copies of runs below a path are left out.
    """
    runs: dict[Path, Path] = {}
    records: dict[Path, Path] = {}
    roots = [path.resolve() for path in paths]
    for path in paths:
        found = list((path.parent / sweep_record.FOLDER).glob("*.json"))  # if it is a run's
        for folder, is_run, folders, files in walk(path):
            folders[:] = [name for name in folders if not has_card(folder / name)]
            if is_run:
                runs.setdefault(folder.resolve(), folder)
            elif folder.name == sweep_record.FOLDER:
                found += folder.glob("*.json")
            elif sweep_record.ALONE in files:
                found.append(folder / sweep_record.ALONE)
        records |= {each.resolve(): each for each in found}
    # by the time in the names of sweeps
    alone = sweep_record.ALONE
    ordered = sorted(records.values(), key=lambda p: p.parent.name if p.name == alone else p.stem)

    def is_below(job: Job) -> bool:
        """Whether its folder is below a path, or may yet be, as it is known once it begins."""
        place = job.folder and job.folder.resolve()
        return place is None or any(map(place.is_relative_to, roots))

    return runs, [*filter(is_below, chain.from_iterable(map(sweep_record.read, ordered)))]


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
        return str(Path(self.run).parent)


def rows_of(runs: dict[Path, Path], jobs: Sequence[Job]) -> tuple[list[Row], str | None]:
    """The rows of all runs, and why SLURM did not answer, or None."""
    signed = {key: read_json(folder / slurm.RECORD) for key, folder in runs.items()}
    own = {key: record.get("job") for key, record in signed.items()}  # SLURM jobs that began runs
    queue, silent = {}, None
    try:
        queue = slurm.queue(filter(None, [*own.values(), *(job.slurm for job in jobs)]))
    except UserError as error:
        silent = str(error)
    newest = {job.folder.resolve(): job for job in jobs if job.folder}
    to_come = [job for key, job in newest.items() if key not in runs]
    to_come += [job for job in jobs if not job.folder and job.slurm not in own.values()]
    begun = ((folder, newest.get(key), own[key]) for key, folder in runs.items())
    known = (*begun, *((None, job, None) for job in to_come))
    rows = filter(None, (row_of(*each, queue, silent) for each in known))
    return sorted(rows, key=lambda row: (row.parent, row.run)), silent


def row_of(
    folder: Path | None, job: Job | None, own: str | None, queue: Queue, silent: str | None
) -> Row | None:
    """The row of a run, or of a job whose run has not begun; None if that has ended, and is gone.

    `job` is of the last sweep that the run belongs to, and `own` the SLURM job that began it.
    """
    state, reason = state_of(folder) if folder else State.NOT_STARTED, None
    ids = [each for each in (job and job.slurm, own) if each]
    held = next((each for each in ids if each in queue), ids[0] if ids else None)
    queued, log = queue.get(held or ""), job.log if job else None
    # what SLURM says of the end of a job, if it still knows it
    word = f"SLURM says {queued.state}" if queued and queued.state != "COMPLETED" else None
    failed = bool(job and job.outcome.get("status") == FAILED)
    if state in (State.FINISHED, State.RUNNING):
        pass
    elif queued and queued.waits:
        state, reason = State.QUEUED, queued.reason
    elif queued and queued.runs:
        state = State.RUNNING
    elif job and job.waits_here:
        state = State.QUEUED
    elif job and failed and not (folder and started_since(folder, job.ended_at)):
        state, reason = State.FAILED, job.outcome["error"]
    elif folder:
        reason = failure_of(folder) or word
    elif job and job.outcome:
        return None
    elif held and silent:
        state, reason = State.UNKNOWN, silent
    else:
        state, reason = State.FAILED if log else state, word
    progress = progress_of(folder, state) if folder else Progress()
    name = folder or (job and (job.folder or " ".join(job.overrides)))
    return Row(str(name), state, progress, held, reason, log)


PLAN = "study.json"  # in the folder of a study: its question and its jobs


def plans(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the folder and the plan of each study that a path is, or holds."""
    for path in paths:
        for file in sorted({path / PLAN, *path.glob(f"*/{PLAN}")}):
            if plan := read_json(file):
                yield file.parent, plan


def study_table(folder: Path, plan: dict[str, Any]) -> Table:
    """The table of a study; a cell is 3/5, 1 running for three of five jobs that are done."""
    jobs = plan["jobs"]
    arms = list(dict.fromkeys(job["arm"] for job in jobs))
    table = Table("stage", *(escape(arm) or "all" for arm in arms), title=escape(plan["question"]))
    for stage in dict.fromkeys(job["stage"] for job in jobs):
        own = [job for job in jobs if job["stage"] == stage]
        table.add_row(stage, *(cell(folder, [j for j in own if j["arm"] == arm]) for arm in arms))
    return table


def cell(folder: Path, jobs: list[dict[str, Any]]) -> str:
    """The states of some jobs in words; empty without any."""
    if not jobs:
        return ""
    states = Counter(state(folder, job) for job in jobs)
    others = (State.RUNNING, State.FAILED, State.STOPPED, State.KILLED)
    words = [f"{states[each]} {each}" for each in others if states[each]]
    return ", ".join([f"{states[State.FINISHED]}/{len(jobs)}", *words])


def state(folder: Path, job: dict[str, Any]) -> State:
    """The state of a job: that of its run, or whether the file is there that it leaves."""
    made = folder / job["made"]
    if job["trains"]:
        return state_of(made) if made.is_dir() else State.NOT_STARTED
    done = job["of"] in read_json(made) if job["of"] else made.exists()
    return State.FINISHED if done else State.NOT_STARTED


COLUMNS: dict[str, JustifyMethod] = {
    **dict.fromkeys(("run", "state"), "left"),
    **dict.fromkeys(("step", "images/s", "left", "SLURM"), "right"),
}
OPEN = (State.QUEUED, State.RUNNING)
TROUBLED = (State.FAILED, State.KILLED, State.NOT_STARTED, State.UNKNOWN)
COLOURS = {State.RUNNING: "cyan", State.FINISHED: "green", State.FAILED: "red", State.KILLED: "red"}


def status(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Shows the state of all runs, with `watch` until none is open; returns the last it showed."""
    check_keys(cfg, {"watch": optional(above(0))})
    paths = [Path(str(path)) for path in as_list(cfg.paths)]
    while True:
        rows, silent = rows_of(*find(paths))
        if cfg.watch:
            console.clear()
        for folder, plan in plans(paths):
            console.print(study_table(folder, plan))
        show(rows, paths, silent)
        if not cfg.watch or not any(row.state in OPEN for row in rows):
            break
        time.sleep(cfg.watch)
    counts = Counter(row.state.value for row in rows)
    plain = [vars(row) | vars(row.progress) | {"state": row.state.value} for row in rows]
    for each in plain:
        del each["progress"]
    return {"runs": plain, "counts": dict(counts), "slurm": silent}


def show(rows: Sequence[Row], paths: Sequence[Path], silent: str | None) -> None:
    """Prints the table, the reasons of runs in trouble, and how many runs are in each state."""
    if not rows:
        say(f"No runs in {', '.join(map(str, paths))}")
        return
    console.print(table_of(rows))
    for row in rows:
        if row.state in TROUBLED and (row.reason or row.log):
            why = "; ".join(filter(None, [row.reason, row.log and f"log: {row.log}"]))
            say(f"{row.state.capitalize()}: {row.run}: {why}")
    if silent and any(row.job and row.state != State.FINISHED for row in rows):
        say(f"Advice: {silent}, so it is not known which jobs wait or run")
    counts = Counter(row.state for row in rows)
    say(", ".join(f"{counts[state]} {state}" for state in State if counts[state]))


def table_of(rows: Sequence[Row]) -> Table:
    """The table of the runs by the folders that they are in, without empty columns."""
    table, written = Table(), [cells(row) for row in rows]
    shown = [name for name in COLUMNS if any(each[name] for each in written)]
    for name in shown:
        table.add_column(name, justify=COLUMNS[name], overflow="fold")
    for folder, group in groupby(zip(rows, written, strict=True), key=lambda pair: pair[0].parent):
        table.add_row(f"[bold]{escape(folder)}")
        for _, each in group:
            table.add_row(*(each[name] for name in shown))
        table.add_section()
    return table


def cells(row: Row) -> dict[str, str]:
    """The cells of a row, by column."""
    progress, colour = row.progress, COLOURS.get(row.state)
    state = f"[{colour}]{row.state}" if colour else row.state
    unfinished = progress.max_steps and row.state != State.FINISHED
    end = f" / {progress.max_steps:,}" if unfinished else ""
    speed, left = progress.images_per_second, progress.seconds_left
    waits = f" {row.reason}" if row.state == State.QUEUED and row.reason else ""
    return {
        "run": f"  {escape(Path(row.run).name)}",
        "state": state,
        "step": f"{progress.step:,}{end}" if progress.step else "",
        "images/s": amount(speed) if speed else "",
        "left": duration(left) if left is not None else "",
        "SLURM": f"{row.job or ''}{waits}",
    }
