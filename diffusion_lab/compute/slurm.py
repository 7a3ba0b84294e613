"""SLURM jobs: what started this process, which run is a job's, how jobs wait and are requeued.

A requeued job keeps its id, by which it finds the run that it started.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_lab.common.files import OUTPUTS, read_json, write_json
from diffusion_lab.common.messages import UserError

RECORD = "slurm_job"  # file in a run folder that names the SLURM job of the run
GROUP = re.compile(r"logger\.\w+\.group=")  # overrides that a sweep adds
SECONDS = 60  # how long a command of SLURM may take
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
ENDED = {  # all other states are those of a job that has nodes
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


class Queued(NamedTuple):
    """A job that SLURM knows: its state, and the reason why it waits or ended."""

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state not in WAITING | ENDED


def started_by_srun() -> bool:
    """Whether srun has started this process as one of a job's tasks.

    An interactive shell from srun or salloc is not such a task, nor is a batch script itself.
    """
    if not os.environ.get("SLURM_STEP_ID", "").isdecimal():
        return False
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return several or not has_terminal()


def has_terminal() -> bool:
    """Whether this process has a terminal, which srun does not give to its tasks."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def tasks() -> int:
    """The number of tasks that srun has started in this step; 1 outside SLURM."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if started_by_srun() else 1


def step() -> str | None:
    """The SLURM job and step of this process, such as 17.0; None outside SLURM."""
    if not started_by_srun():
        return None
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"


def job() -> str:
    """The id of this process's job as squeue prints it: 17, or 17_3 for a job of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def queue(jobs: Iterable[str]) -> dict[str, Queued]:
    """Asks SLURM for jobs; returns those not yet forgotten. UserError if squeue does not answer."""
    ids = sorted({each.split("_")[0] for each in jobs})
    if not ids:
        return {}
    # each id twice: squeue calls a single one that it has forgotten an error
    asked = ("--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join([*ids, *ids])}")
    try:
        lines = _called("squeue", "--noheader", *asked).splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise UserError(f"squeue does not answer: {said[0] if said else error}") from error
    found = (line.split("|") for line in lines)
    return {each: Queued(state, reason) for each, state, reason in found}


def executor(launcher: Mapping[str, Any]) -> Any:
    """The submitit executor that hydra/launcher=slurm describes; it needs the extra `slurm`."""
    from dataclasses import fields

    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    params = {k: v for k, v in launcher.items() if k not in ("_target_", "wait")}
    if params["gpus_per_node"] == "auto":
        found = ""
        with suppress(OSError, subprocess.SubprocessError):
            found = _called("sinfo", "--noheader", "--format=%G")  # the resources of all nodes
        params["gpus_per_node"] = params["tasks_per_node"] if "gpu" in found else None
    made = submitit.AutoExecutor(
        cluster="slurm",
        folder=params.pop("submitit_folder"),
        slurm_max_num_timeout=params.pop("max_num_timeout"),
    )
    shared = {field.name for field in fields(BaseQueueConf)}  # not SLURM's alone
    made.update_parameters(**{k if k in shared else f"slurm_{k}": v for k, v in params.items()})
    return made


def own_run(name: str, run_dir: str | None, command: str, overrides: list[str]) -> Path | None:
    """The folder of the run that this step began before its job was requeued, or None.

    A step may begin many runs, and its job may be restarted many times: the run has the same
    command line, and began before the last restart.
    """
    if step() is None:
        return None
    asked = _record(command, overrides)
    restarts = asked.pop("restarts")

    def is_own(folder: Path) -> bool:
        found = read_json(folder / RECORD)
        return found.pop("restarts", restarts) < restarts and found == asked

    folders = [Path(run_dir)] if run_dir else sorted((OUTPUTS / name).glob("*"))
    return next(filter(is_own, reversed(folders)), None)


def sign(folder: Path, command: str, overrides: list[str]) -> None:
    """Records the SLURM job, step and command of a new run in its folder; nothing outside SLURM."""
    if step():
        write_json(folder / RECORD, _record(command, overrides))


def _record(command: str, overrides: list[str]) -> dict[str, Any]:
    return {
        "job": job(),
        "step": step(),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "command": command,
        # without a sweep's group, whose name changes when the sweep is started again
        "overrides": [each for each in overrides if not GROUP.match(each)],
    }


def requeue() -> str:
    """Puts this process's job back in the queue, which ends it; returns why not, or an empty text.

    A job that is cancelled, or that SLURM is already requeueing, is not RUNNING and is left alone.
    """
    this = job()  # the number alone may be the whole array's
    try:
        state = _called("squeue", "--noheader", f"--jobs={this}", "--format=%T")
        if state != "RUNNING":
            return f"its state is {state}"
        _called("scontrol", "requeue", this)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _called(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    return done.stdout.strip()
