"""How a process of the program ends: what it says or leaves to the process that started it."""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from diffusion_lab.assembly.sentences import MISTAKES, sentence
from diffusion_lab.common.files import write_json
from diffusion_lab.compute import started

STOPPED = 130  # the exit code of a command that Ctrl-C has ended
REPLY = "DIFFUSION_LAB_REPLY"  # the variable with the file for a result or an error


def say(line: str) -> None:
    """Prints one line on standard error, on any rank."""
    print(line, file=sys.stderr)


def reply(**content: object) -> bool:
    """Leaves a result or an error to the process that has started this one; False if none has."""
    path = os.environ.get(REPLY)
    if path:
        write_json(Path(path), content)
    return bool(path)


def fail(message: str) -> NoReturn:
    """Prints one sentence, of several processes the first, and exits with code 2."""
    if is_first() and not reply(error=message):
        say(f"diffusion-lab: {message}")
    sys.exit(2)


def is_first() -> bool:
    """Whether this process is the first to fail of those that were started together."""
    if not started.in_a_group():
        return True
    from diffusion_lab.compute.distributed import first_to_fail  # late: torch takes seconds

    return first_to_fail()


def leave_group(error: Exception) -> NoReturn:
    """Ends this process, one of several, after an error; exits with the code of one process."""
    from diffusion_lab.compute import distributed

    lost = distributed.another_ended(error)
    follows = isinstance(error, distributed.FirstStopped)
    if lost or follows:
        time.sleep(distributed.SECONDS_TO_BE_ENDED_IN)  # the launcher ends this process too
    if follows:
        sys.exit(2)
    if lost:
        fail("another process of this command ended, or did not answer")
    if isinstance(error, MISTAKES):
        fail(sentence(error))
    if is_first():
        reply(code=1)
        traceback.print_exception(error)
    sys.exit(1)
