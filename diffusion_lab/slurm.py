"""A job of SLURM: what started this process, whose run it is, and how it is put back in the queue.

A job that is requeued keeps its id, and so finds the run that it has begun.
"""

import os
import subprocess
from pathlib import Path

RECORD = "slurm_job"  # in the folder of a run that a job of SLURM trains: that job
INTERACTIVE = ("bash", "interactive")  # what a job is named in which people type
SECONDS = 60  # how long one of its commands may take


def started_by_srun() -> bool:
    """Whether srun has started this process as one of a job's tasks.

    A shell that srun or salloc gives to a person is none, nor is a batch script itself.
    """
    if not os.environ.get("SLURM_STEP_ID", "").isdecimal():
        return False
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return several or os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def tasks() -> int:
    """How many tasks srun has started in this step; 1 outside SLURM."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if started_by_srun() else 1


def step() -> str | None:
    """The job and the step in it that this process is of, as in 17.0; None outside SLURM."""
    if not started_by_srun():
        return None
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"


def own_run(name: str, run_dir: str | None) -> Path | None:
    """The folder of the run that this step has begun before it was requeued, if it was."""
    this = step()
    if this is None:
        return None
    folders = [Path(run_dir)] if run_dir else sorted((Path("outputs") / name).glob("*"))
    owned = [folder for folder in folders if _record(folder) == this]
    return owned[-1] if owned else None


def sign(folder: Path) -> None:
    """Notes in the folder of a new run which step of which job it belongs to."""
    if this := step():
        (folder / RECORD).write_text(f"{this}\n")


def _record(folder: Path) -> str | None:
    try:
        return (folder / RECORD).read_text().strip()
    except OSError:
        return None


def requeue() -> str:
    """Puts this process's job back in the queue, which ends it; returns why not, or nothing.

    A job that is cancelled, or that SLURM is already requeueing, is no longer running, and left.
    """
    job = os.environ["SLURM_JOB_ID"]
    try:
        state = _called("squeue", "--noheader", f"--jobs={job}", "--format=%T")
        if state != "RUNNING":
            return f"SLURM has it as {state}"
        _called("scontrol", "requeue", job)
    except subprocess.CalledProcessError as error:
        return error.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _called(*command: str) -> str:
    settings = {"capture_output": True, "text": True, "timeout": SECONDS}
    return subprocess.run(command, check=True, **settings).stdout.strip()
