"""The lock of a run folder, so that only one process at a time trains in it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffusion_lab.common.files import WITHOUT_LOCKS
from diffusion_lab.common.messages import UserError, say

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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    holder = (folder / FILE).read_text().strip() or "another process"
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
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None
