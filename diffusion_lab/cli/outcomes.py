"""What became of the jobs of a sweep: a file each beside the sweep's, told at its end."""

import json
import os
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from diffusion_lab.build.overrides import key_of, parse
from diffusion_lab.common.files import OUTPUTS, write_atomically

DONE, SKIPPED, FAILED = "trained", "finished before", "failed"


def new_sweep() -> str:
    """A folder for what a sweep leaves besides its runs."""
    return f"{OUTPUTS}/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"


def sweep_overrides(sweep: str, arguments: list[str]) -> list[str]:
    """Hydra's own overrides for a sweep by these arguments: its folder, and what is fixed in it.

    Jobs may run in other processes, on other machines: they know of the sweep what these say.
    """
    fixed: dict[str, bool] = {}
    for argument in arguments:
        if "=" in argument and not argument.startswith(("-", "hydra")):
            (override,) = parse([argument])
            fixed[key_of(override)] = not override.is_sweep_override()  # the last one counts
    names = ",".join(f"'{key}'" for key, alone in fixed.items() if alone)
    return [
        f"hydra.sweep.dir={sweep}",
        f"hydra.job.config.override_dirname.exclude_keys=[{names}]",
    ]


def note(sweep: str, number: int, status: str, overrides: list[str], **more: str) -> None:
    """Keeps what became of a job, and the overrides that run it alone."""
    folder = Path(sweep) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {"status": status, "overrides": overrides} | more
    write_atomically(folder / f"{number}.json", json.dumps(outcome, indent=2) + "\n")


def none_done(sweep: str) -> bool:
    """Whether all jobs of a sweep have failed."""
    outcomes = read(sweep)
    return bool(outcomes) and all(outcome["status"] == FAILED for outcome in outcomes)


def read(sweep: str) -> list[dict]:
    """What became of the jobs, in their order."""
    files = sorted((Path(sweep) / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in files]


def tell(sweep: str, command: list[str], say: Callable[[str], None]) -> bool:
    """Says what a sweep's jobs came to, and how each failed one is run; whether there are such.

    `command` is what overrides are given to: train, and Hydra's flags with their values.
    """
    outcomes = read(sweep)
    counts = {s: sum(o["status"] == s for o in outcomes) for s in (DONE, SKIPPED, FAILED)}
    if outcomes:
        say("Runs: " + ", ".join(f"{count} {s}" for s, count in counts.items() if count))
    for outcome in outcomes:
        if outcome["status"] == FAILED:
            say(f"Failed: {outcome['error']}; alone it is run by")
            say(f"  diffusion-lab {shlex.join([*command, *outcome['overrides']])}")
    return counts[FAILED] > 0
