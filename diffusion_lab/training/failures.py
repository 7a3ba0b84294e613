"""How a run ends that cannot go on: with one sentence, which says what to do."""

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from diffusion_lab.common.messages import TrainingStopped, UserError
from diffusion_lab.compute.distributed import rank_and_world
from diffusion_lab.runs import checkpoints

SECONDS_TO_BE_ENDED_IN = 10
# why a file cannot be read or written that is no defect of the program
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
NO_SUCH_PLACE = (PermissionError, NotADirectoryError, IsADirectoryError)


def resume_command(command: str, folder: Path) -> str:
    """The command line that goes on with a run."""
    return f"diffusion-lab {command} resume={folder}"


@contextmanager
def explaining_failures(command: str, folder: Path | None) -> Iterator[None]:
    """Turns what stops a run, and is no defect of it, into a UserError that says how to go on.

    `folder` is the run's, None where only the processes that were started know it. Where all ranks
    stop for the same reason, the first says it.
    """
    try:
        yield
    except TrainingStopped as error:
        reason = str(error)
        if rank_and_world()[0] != 0:
            sys.exit(2)
    except (ConnectionError, EOFError) as error:  # also how the end of a loading process shows
        reason = f"a process that loads data died: {str(error) or type(error).__name__}"
    except OSError as error:
        if error.errno not in DISK_TROUBLE and not isinstance(error, NO_SUCH_PLACE):
            raise
        reason = f"{error.filename or 'a file'} could not be read or written ({error.strerror})"
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # torch has no class of its own for these
            reason = f"a process that loads data died: {str(error).splitlines()[0]}"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            # whoever started the processes ends this one too, and says which was the first
            time.sleep(SECONDS_TO_BE_ENDED_IN)
            reason = "another process of this run ended, or did not answer"
        else:
            raise
    else:
        return
    raise UserError(f"training stopped: {reason.rstrip('. ')}; {remedy(command, folder)}")


def remedy(command: str, folder: Path | None) -> str:
    """What can be done about a run that stopped."""
    if folder is None:
        return f"{resume_command(command, Path('FOLDER'))} goes on from what the run had saved"
    if checkpoints.exists(folder):
        return f"what was saved is whole, and {resume_command(command, folder)} goes on from it"
    return "nothing was saved yet, so begin anew"
