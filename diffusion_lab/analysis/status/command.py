"""The command `status`: one table of runs that wait, train, have ended or failed."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from diffusion_lab.analysis.status import studies
from diffusion_lab.analysis.status.found import find
from diffusion_lab.analysis.status.rows import Row, rows_of
from diffusion_lab.build.config_keys import as_list
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import console, say
from diffusion_lab.common.ranges import above, optional
from diffusion_lab.runs.progress import State

COLUMNS: dict[str, JustifyMethod] = {
    **dict.fromkeys(("run", "state"), "left"),
    **dict.fromkeys(("step", "images/s", "left", "SLURM"), "right"),
}
OPEN = (State.QUEUED, State.RUNNING)
TROUBLED = (State.FAILED, State.KILLED, State.NOT_STARTED, State.UNKNOWN)
COLOURS = {State.RUNNING: "cyan", State.FINISHED: "green", State.FAILED: "red", State.KILLED: "red"}


def status(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Shows the state of all runs, again and again with `watch`; returns the last that it showed.

    Watching ends when no run is queued or running.
    """
    check_keys(cfg, {"watch": optional(above(0))})
    paths = [Path(str(path)) for path in as_list(cfg.paths)]
    while True:
        rows, silent = rows_of(find(paths))
        if cfg.watch:
            console.clear()
        for folder, plan in studies.plans(paths):
            console.print(studies.table_of(folder, plan))
        show(rows, paths, silent)
        if not cfg.watch or not any(row.state in OPEN for row in rows):
            break
        time.sleep(cfg.watch)
    counts = Counter(row.state.value for row in rows)
    return {"runs": [plain(row) for row in rows], "counts": dict(counts), "slurm": silent}


def plain(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    of_row = {key: value for key, value in vars(row).items() if key != "progress"}
    return of_row | vars(row.progress) | {"state": row.state.value}


def show(rows: Sequence[Row], paths: Sequence[Path], silent: str | None) -> None:
    """Prints the table, the reasons of runs in trouble, and how many runs are in each state."""
    if not rows:
        say(f"No runs in {', '.join(map(str, paths))}")
        return
    console.print(table_of(rows))
    for row in rows:
        if row.state in TROUBLED and (row.reason or row.log):
            log = f"log: {row.log}" if row.log else ""
            say(
                f"{row.state.capitalize()}: {row.run}: {'; '.join(filter(None, (row.reason, log)))}"
            )
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
