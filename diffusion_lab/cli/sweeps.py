"""Sweeps of training runs: each job writes its outcome to a file, and the sweep reports them."""

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path

from diffusion_lab.build.overrides import key_of, parse
from diffusion_lab.cli.arguments import MULTIRUN, apart
from diffusion_lab.cli.job import run, say
from diffusion_lab.common.files import OUTPUTS, read_json, write_json
from diffusion_lab.common.messages import UserError

DONE, SKIPPED, FAILED = "trained", "already finished", "failed"


def sweep(name: str, arguments: list[str]) -> None:
    """Runs a sweep, and reports the outcomes of its jobs when it ends or is stopped."""
    flags, overrides = apart(arguments)
    check_params(overrides)
    folder = f"{OUTPUTS}/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    if any(override.startswith("hparams_search=") for override in overrides):
        # the search writes its database there
        names = [o.partition("=")[2] for o in overrides if o.startswith("study_name=")]
        (OUTPUTS / (names or ["search"])[-1]).parent.mkdir(parents=True, exist_ok=True)
    try:
        run(name, [*flags, *overrides, *sweep_overrides(folder, overrides)])
    except ValueError:
        outcomes = read(folder)
        if not outcomes or any(outcome["status"] != FAILED for outcome in outcomes):
            raise  # if all jobs failed, the error is only that Optuna finds no best trial
    finally:
        alone = [name, *(flag for flag in flags if flag not in MULTIRUN)]
        failed = report(folder, alone)
    if failed:
        sys.exit(1)


def check_params(overrides: list[str]) -> None:
    """Raises UserError if hydra.sweeper.params is overridden without a +study."""
    given = [o for o in overrides if o.lstrip("+").startswith("hydra.sweeper.params")]
    if given and not any(override.startswith("+study=") for override in overrides):
        raise UserError(
            f"{given[0]} is syntax for the file of a study, and there is no +study=...; write "
            "the values themselves, as in seed=0,1"
        )


def sweep_overrides(sweep: str, overrides: list[str]) -> list[str]:
    """Hydra's own overrides for a sweep by `overrides`: its folder, and the keys that are fixed.

    Jobs may run in other processes or on other machines, where only these describe the sweep.
    """
    parsed = parse(each for each in overrides if "=" in each and not each.startswith("hydra"))
    varies = {key_of(override): override.is_sweep_override() for override in parsed}
    names = ",".join(f"'{key}'" for key, several in varies.items() if not several)
    return [
        f"hydra.sweep.dir={sweep}",
        f"hydra.job.config.override_dirname.exclude_keys=[{names}]",
    ]


def note(sweep: str, number: int, status: str, overrides: list[str], **more: str) -> None:
    """Saves the outcome of a job, and the overrides that run it alone."""
    folder = Path(sweep) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{number}.json", {"status": status, "overrides": overrides} | more)


def read(sweep: str) -> list[dict]:
    """Reads the outcomes of the jobs, in order of their numbers."""
    files = sorted((Path(sweep) / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return list(map(read_json, files))


def report(sweep: str, command: list[str]) -> bool:
    """Prints the outcomes of a sweep and how to run each failed job; returns whether any failed.

    `command` is the command line without overrides: train, and Hydra's flags with their values.
    """
    outcomes = read(sweep)
    counts = {s: sum(o["status"] == s for o in outcomes) for s in (DONE, SKIPPED, FAILED)}
    if outcomes:
        say("Runs: " + ", ".join(f"{count} {s}" for s, count in counts.items() if count))
    for outcome in outcomes:
        if outcome["status"] == FAILED:
            say(f"Failed: {outcome['error']}. To run this job alone:")
            say(f"  diffusion-lab {shlex.join([*command, *outcome['overrides']])}")
    return counts[FAILED] > 0
