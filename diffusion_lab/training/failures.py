"""Ends a run that cannot continue with one sentence that says what to do."""

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusion_lab.common.messages import TrainingStopped, UserError, say
from diffusion_lab.compute.distributed import SECONDS_TO_BE_ENDED_IN, another_ended, rank_and_world
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.progress import reason_of
from diffusion_lab.training.callbacks import Interruption

# errors in reading or writing a file that the program did not cause
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
NO_SUCH_PLACE = (PermissionError, NotADirectoryError, IsADirectoryError)


def resume_command(command: str, folder: Path) -> str:
    """The command line that resumes a run."""
    return f"diffusion-lab {command} resume={folder}"


@contextmanager
def explaining_failures(command: str, folder: Path | None) -> Iterator[None]:
    """Turns failures that the program did not cause into a UserError that says how to resume.

    Where a second Ctrl-C ends training at once, it says so, too, and raises KeyboardInterrupt.
    `folder` is the run's, None if only the launched processes know it. If all ranks stop for the
    same reason (TrainingStopped), only the first says so.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning turns the first into the second
        say(f"Stopped at once; {remedy(command, folder)}")
        raise KeyboardInterrupt from end
    except TrainingStopped as error:
        reason = str(error)
        if rank_and_world()[0] != 0:
            sys.exit(2)
        if error.final:
            raise UserError(f"training stopped: {reason}") from error
    except (ConnectionError, EOFError) as error:  # also if a process that loads data dies
        reason = f"a process that loads data died: {str(error) or type(error).__name__}"
    except OSError as error:
        if error.errno not in DISK_TROUBLE and not isinstance(error, NO_SUCH_PLACE):
            raise
        reason = f"{error.filename or 'a file'} could not be read or written ({error.strerror})"
    except Exception as error:
        # torch raises this in a signal's handler, so in the middle of other code, which may then
        # raise another error
        died = [str(each) for each in chain_of(error) if "DataLoader worker" in str(each)]
        if died:
            reason = f"a process that loads data died: {died[0].splitlines()[0]}"
        elif another_ended(error):
            # the launcher ends this process too, and reports which one failed first
            time.sleep(SECONDS_TO_BE_ENDED_IN)
            reason = "another process of this run ended, or did not answer"
        else:
            raise
    else:
        return
    raise UserError(f"training stopped: {reason.rstrip('. ')}; {remedy(command, folder)}")


@contextmanager
def restoring(checkpoint: Path | None, interruption: Interruption) -> Iterator[None]:
    """Turns an error before the first step of a resumed run into a UserError on its checkpoint."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = isinstance(error, UserError | torch.OutOfMemoryError) or another_ended(error)
        if checkpoint is None or interruption.began or told:
            raise
        raise UserError(
            f"{checkpoint} does not fit this run ({reason_of(error).rstrip(': ')}), as if it were "
            "of another run or program; put the run's own in its place, or train the run again"
        ) from error


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and the errors during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def remedy(command: str, folder: Path | None) -> str:
    """The advice on how to continue a run that stopped."""
    if folder is None:
        return f"resume from the last checkpoint with {resume_command(command, Path('FOLDER'))}"
    if checkpoints.exists(folder):
        return f"resume from the last checkpoint with {resume_command(command, folder)}"
    return "nothing was saved yet, so start again"
