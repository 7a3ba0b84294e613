"""The state of a run as its folder shows it, the reason why it failed, and how far it has come."""

import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from diffusion_lab.assembly.sentences import MISTAKES, sentence
from diffusion_lab.common.files import WITHOUT_LOCKS, last_rows, lock, write_atomically
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.runs.files import CONFIG, METRICS, SUMMARY, read_config
from diffusion_lab.runs.summary import load_summary

FILE = ".lock"  # in the run folder; the system releases the lock whenever its process ends


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run folder during the block, on rank 0; warns if the file system has no locks.

    Raises UserError if another process holds the lock or the folder cannot be written to.
    """
    if not _on_rank_zero():
        yield
        return
    with ExitStack() as stack:
        try:
            # unbuffered: closing a buffered file would repeat a write that failed
            file = stack.enter_context((folder / FILE).open("ab+", buffering=0))
            lock(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError as error:
            raise _held(folder) from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise UserError(
                    f"{folder} cannot be written to ({error.strerror}); choose another folder with "
                    "run_dir=..., or make this one writable"
                ) from error
            say(
                f"Advice: the file system of {folder} has no locks, so nothing stops a second "
                "process from training the same run; make sure that there is none"
            )
        yield


def require_unlocked(folder: Path) -> None:
    """Raises UserError, on rank 0, if another process is training the run."""
    if _on_rank_zero() and is_locked(folder):
        raise _held(folder)


def _on_rank_zero() -> bool:
    from diffusion_lab.compute.distributed import rank_and_world  # late: torch takes seconds

    return rank_and_world()[0] == 0


def _held(folder: Path) -> UserError:
    holder = "another process"
    with suppress(OSError):  # Windows lets nobody else read a locked file
        holder = (folder / FILE).read_text().strip() or holder
    return UserError(f"{folder} is being trained by {holder}; wait until it ends, or stop it")


def has_locks(folder: Path) -> bool:
    """Whether the file system has locks, which show that a process is training the run."""
    refused = _refused(folder)
    return refused is None or refused.errno not in WITHOUT_LOCKS


def is_locked(folder: Path) -> bool:
    """Whether a process is training the run, as far as the file system shows it."""
    return isinstance(_refused(folder), BlockingIOError)


def _refused(folder: Path) -> OSError | None:
    """The error of asking for a lock on the run (held, no lock file, no locks); None if granted."""
    try:
        with (folder / FILE).open() as file:
            lock(file, shared=True)
    except OSError as error:
        return error
    return None


ERROR = "error.txt"  # file in the folder of a run that failed


class State(StrEnum):
    """The state of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"  # in order, with everything saved
    KILLED = "killed"
    NOT_STARTED = "not started"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Progress:
    """The steps of a run so far and in the end, its speed, and the training that is left."""

    step: int = 0
    max_steps: int | None = None  # None if the time limit comes first
    images_per_second: float | None = None
    seconds_left: float | None = None  # without evaluation


@contextmanager
def failure_noted(folder: Path) -> Iterator[None]:
    """Writes the first error that ends a run, on any rank, into the run's folder."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # the disk may be full
            if not (folder / ERROR).exists():
                write_atomically(folder / ERROR, reason_of(error) + "\n")
        raise


def reason_of(error: Exception) -> str:
    """The sentence of an error that users can mend, or the name and first line of another."""
    if isinstance(error, MISTAKES):
        return sentence(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def failure_of(folder: Path) -> str | None:
    """The reason why a run failed; None if it did not, or was started again since."""
    try:
        return (folder / ERROR).read_text().strip()
    except OSError:
        return None


def state_of(folder: Path) -> State:
    """The state of a run that has begun."""
    if load_summary(folder).finished:
        return State.FINISHED
    if is_locked(folder):
        return State.RUNNING
    if failure_of(folder):
        return State.FAILED
    if not has_locks(folder):
        return State.UNKNOWN
    return State.STOPPED if _changed(folder / SUMMARY) > _changed(folder / CONFIG) else State.KILLED


def started_since(folder: Path, seconds: float) -> bool:
    """Whether the run was started or resumed after a time in seconds since 1970."""
    return _changed(folder / CONFIG) > seconds


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
SHORT = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h|d)")  # such as 5min
LIMIT = re.compile(rf"{SHORT.pattern}|\d+:\d\d:\d\d:\d\d")  # or DD:HH:MM:SS


def seconds_in(limit: str | dict[str, float]) -> float:
    """The seconds of a time limit: 5min, DD:HH:MM:SS, or numbers by units, as timedelta's."""
    if isinstance(limit, str) and (short := SHORT.fullmatch(limit)):
        return float(short[1]) * SECONDS[short[2]]
    if isinstance(limit, str):
        units = ("days", "hours", "minutes", "seconds")
        limit = dict(zip(units, map(float, limit.split(":")), strict=True))
    return timedelta(**limit).total_seconds()


def progress_of(folder: Path, state: State) -> Progress:
    """How far a run in this state has come."""
    steps = load_summary(folder).steps
    if state == State.FINISHED:
        return Progress(steps, steps)
    row: dict[str, Any] = {"step": 0, "seconds": 0.0}
    for each in last_rows(folder / METRICS):
        row |= each
    step, rate = steps, row.get("train/images_per_second")
    try:
        step = max(step, row["step"])
        cfg: Any = read_config(folder)
        limit = seconds_in(cfg.trainer.max_time) if cfg.trainer.max_time else math.inf
        by_steps = (cfg.trainer.max_steps - step) * cfg.batch_size / rate if rate else math.inf
        by_time = limit - row["seconds"]
        end = None if by_time < by_steps else cfg.trainer.max_steps
    except Exception:  # of YAML and OmegaConf: the file is damaged, or of an old format
        return Progress(step)
    if state != State.RUNNING:
        return Progress(step, end)
    left = min(by_steps, by_time)
    return Progress(step, end, rate, max(0.0, left) if math.isfinite(left) else None)
