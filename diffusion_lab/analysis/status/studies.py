"""The table of a study: its stages by its arms, with the jobs that are done, run or failed."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffusion_lab.common.files import read_json
from diffusion_lab.runs.progress import State, state_of

PLAN = "study.json"  # in the folder of a study: its question and its jobs


def plans(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the folder and the plan of each study that a path is, or holds."""
    for path in paths:
        for file in sorted({path / PLAN, *path.glob(f"*/{PLAN}")}):
            if plan := read_json(file):
                yield file.parent, plan


def table_of(folder: Path, plan: dict[str, Any]) -> Table:
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
    words = [f"{states[State.FINISHED]}/{len(jobs)}"]
    for each in (State.RUNNING, State.FAILED, State.STOPPED, State.KILLED):
        if states[each]:
            words.append(f"{states[each]} {each}")
    return ", ".join(words)


def state(folder: Path, job: dict[str, Any]) -> State:
    """The state of a job: that of its run, or whether the file is there that it leaves."""
    made = folder / job["made"]
    if job["trains"]:
        return state_of(made) if made.is_dir() else State.NOT_STARTED
    done = job["of"] in read_json(made) if job["of"] else made.exists()
    return State.FINISHED if done else State.NOT_STARTED
