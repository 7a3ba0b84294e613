"""Sweeps of training runs: each job writes its outcome to a file, and the sweep reports them."""

import os
import shlex
import sys
from datetime import datetime
from itertools import count
from pathlib import Path

from diffusion_lab.build.overrides import key_of, parse
from diffusion_lab.cli.arguments import MULTIRUN, apart
from diffusion_lab.cli.job import run, say
from diffusion_lab.cli.tuning_stage import tune
from diffusion_lab.common.files import OUTPUTS, read_json, write_json
from diffusion_lab.common.messages import UserError

DONE, SKIPPED, FAILED = "trained", "already finished", "failed"


def sweep(name: str, arguments: list[str]) -> None:
    """Runs a sweep, after its tuning if it has one; exits with code 1 if one of its jobs failed."""
    flags, overrides = apart(arguments)
    check_params(overrides)
    tune(name, flags, overrides, lambda chosen: multirun(name, flags, chosen))
    outcomes = multirun(name, flags, overrides)
    if any(outcome["status"] == FAILED for outcome in outcomes):
        sys.exit(1)


def multirun(name: str, flags: list[str], overrides: list[str]) -> list[dict]:
    """Runs one sweep, reports the outcomes of its jobs, and returns them."""
    folder = new_folder()
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
        report(folder, alone)
    return read(folder)


def new_folder() -> str:
    """The folder of a sweep that starts now; a study that is tuned has several sweeps."""
    begun = f"{OUTPUTS}/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    names = (f"{begun}{'' if number == 1 else f'_{number}'}" for number in count(1))
    return next(name for name in names if not Path(name).exists())


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


def report(sweep: str, command: list[str]) -> None:
    """Prints the outcomes of a sweep, and how to run each failed job.

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
