"""Writes files atomically, and reads rows whose last one may be cut off."""

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError

from diffusion_lab.common.messages import UserError

OUTPUTS = Path("outputs")  # where runs go by default
UNFINISHED = ".part"  # the end of a file's name while it is written
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks
TAIL = 2**16  # bytes at the end of a JSON lines file that hold its last rows


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` at the end of the block, once it is on the disk.

    If the block fails, the old file at `path` stays, and the temporary one is removed. An OSError
    names `path`, which the system does not name when a write fails.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            to_disk(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch raises its own error on top of the file's
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        if cause.errno is not None and cause.filename in (None, str(temporary)):
            cause.filename = str(path)
        raise cause from None
    finally:
        with suppress(OSError):  # a place that cannot be written to has told so above
            temporary.unlink(missing_ok=True)


def to_disk(file: BinaryIO) -> None:
    """Waits until the written content is on the disk, where it survives a loss of power."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of `path` atomically."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: object) -> None:
    """Replaces the content of `path` with plain values as indented JSON."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; an empty one if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def add_to_json(path: Path, entries: dict[str, Any]) -> None:
    """Adds entries to the dictionary in a JSON file, losing none that other processes add."""
    with one_at_a_time(path.with_name(f".{path.name}.lock")):
        write_json(path, read_json(path) | entries)


def lock(file: IO, *, shared: bool = False, wait: bool = False) -> None:
    """Locks an open file until it is closed or its process ends, on Linux, macOS and Windows.

    Raises BlockingIOError if another process holds it and this one does not `wait`, and another
    OSError if the system refuses, one of `WITHOUT_LOCKS` where it has no locks.
    """
    import portalocker  # late: most commands that read a run lock nothing

    kind = portalocker.LockFlags.SHARED if shared else portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(file, kind if wait else kind | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked as error:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    except portalocker.LockException as error:
        cause = error.args[0]
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error)) from error


@contextmanager
def one_at_a_time(path: Path) -> Iterator[bool]:
    """Waits until no other process is in a block with this lock file, if the system has locks.

    Yields whether it has: if not, other processes may be in such a block. The folder is made if it
    is not there; the file may be removed in the block.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            locked = True
            try:
                lock(file, wait=True)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                locked = False
            # else the process that was waited for has removed it, and another may hold a new one
            if not locked or _is_at(file, path):
                yield locked
                return


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_unfinished(folder: Path, names: str = "*") -> None:
    """Removes what killed processes left of files named like `names`; none may be writing now."""
    for path in folder.glob(f".{names}{UNFINISHED}"):
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file, none if it is missing; lines cut off by a kill are skipped."""
    return _rows(path.read_text(errors="replace")) if path.is_file() else []


def last_rows(path: Path) -> list[dict]:
    """The last rows of a JSON lines file, read from its end; none if it is missing."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return _rows(file.read().decode(errors="replace"))


def _rows(text: str) -> list[dict]:
    rows = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def require_own(output: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UserError if `output` is a file, or a folder with files in it that is not ours."""
    if output.is_file():
        raise UserError(f"output={output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not is_ours(output):
        raise UserError(
            f"output={output} contains other files; choose another folder with output=..."
        )


def require_writable(key: str, place: str, otherwise: str) -> None:
    """Raises UserError, with the advice `otherwise`, if no file can be made at `key=place`."""
    path = Path(place)
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{key}={path} cannot be written to ({error.strerror}); make {folder} writable, or "
            f"{otherwise}"
        ) from error


def named(output: Path) -> Path:
    """The path of a file to write; raises UserError for a folder alone, as in output=."""
    if output.name in ("", ".."):
        raise UserError(
            f"output={output} has no name for what is written; add one, as in {output / 'NAME'}"
        )
    return output


def make_folder(output: Path) -> None:
    """Creates a folder; raises UserError if it cannot be created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be created ({error}); choose another") from error


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """Yields a new folder, which takes the place of `output` at the end of the block.

    If the block fails, `output` stays as it was. Raises UserError if it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            if output.exists():
                os.rename(output, old)
            os.rename(new, output)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"output={output} cannot be written ({reason}); free space, or choose another folder"
        ) from error
