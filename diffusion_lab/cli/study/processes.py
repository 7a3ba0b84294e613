"""Runs commands in processes of this machine, several at once, each in one of its own."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from diffusion_lab.cli.job import REPLY, STOPPED
from diffusion_lab.cli.study.document import slug
from diffusion_lab.cli.study.jobs import StudyJob, present
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import say

LOADED = ("diffusion_lab.cli.training_job", "timm")  # what trainings import, once for all of them


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, its sentence if it failed, and its time in seconds.

    It `diverged` if it failed because samples were not finite.
    """

    job: StudyJob
    code: int
    error: str
    result: object
    seconds: float
    diverged: bool = False


class Processes:
    """Up to `count` processes at once, with the lines of each in a file of `logs` if several.

    A process that is killed is one failed job. If this process ends, they save and stop.
    """

    def __init__(self, count: int, logs: Path, flags: Sequence[str]):
        self.count, self.logs, self.flags = count, logs, list(flags)
        self.running: dict[BaseProcess, tuple[StudyJob, Path, float]] = {}
        if count > 1:  # else they would wait for one another
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"  # as on Windows
        self.context: Any = multiprocessing.get_context(method)
        self.context.set_forkserver_preload(list(LOADED))

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function that needs torch in a process which has it, as this one has not."""
        with self.context.Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            pool.apply(function, arguments)

    @property
    def room(self) -> bool:
        """Whether another job may start."""
        return len(self.running) < self.count

    def start(self, job: StudyJob) -> None:
        """Starts a job; there must be room for it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{slug(job.title)}.log"
        reply = log.with_suffix(".json")
        reply.unlink(missing_ok=True)
        own = log if self.count > 1 else None
        arguments = (job.command, [*self.flags, *job.arguments], own, reply)
        process = self.context.Process(target=execute, args=arguments)
        process.start()
        self.running[process] = (job, log, time.monotonic())

    def ended(self, seconds: float) -> Iterator[Ended]:
        """Waits until a job ends, but no more than so many seconds, and yields each that has."""
        if self.running:
            wait([process.sentinel for process in self.running], seconds)
        for process in [each for each in self.running if not each.is_alive()]:
            process.join()
            job, log, begun = self.running.pop(process)
            code = process.exitcode or 0
            reply = read_json(log.with_suffix(".json"))
            error = reply.get("error", "")
            if code < 0:
                error = f"its process was ended by {signal.Signals(-code).name}"
            elif code and not error:
                error = f"it ended with exit code {code}"
            seen = f"; log: {log}" if code and self.count > 1 else ""
            result, diverged = reply.get("result"), bool(code and reply.get("diverged"))
            yield Ended(job, code, error + seen, result, time.monotonic() - begun, diverged)

    def stop(self) -> None:
        """Lets all processes save what they have and stop."""
        for process in self.running:
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        say("Stopping: the runs save what they have")
        for process in self.running:
            process.join()
        self.running.clear()


def execute(command: str, arguments: list[str], log: Path | None, reply: Path) -> None:
    """Runs a command in this new process, which then ends with the command's exit code."""
    os.setpgrp()  # the terminal's Ctrl-C is for the study, which stops its jobs itself
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if log:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ[REPLY] = str(reply)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    from diffusion_lab.cli.program import execute as run

    try:
        run(present(command, arguments))
    except KeyboardInterrupt:
        sys.exit(STOPPED)


def _stop_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)
