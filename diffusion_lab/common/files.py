"""Files that exist whole or not at all, and rows of which the last may be cut."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

OUTPUTS = Path("outputs")  # where runs go by default
UNFINISHED = ".part"  # the end of a file's name while it is written


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which takes its place at the end of the block, once it is on the disk.

    If the block fails, what was at `path` stays, and nothing else is left. An OSError of it names
    `path`, which what the system says of writing does not.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            to_disk(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch has an error of its own, on top of the file's
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        if cause.errno is not None and cause.filename in (None, str(temporary)):
            cause.filename = str(path)
        raise cause from None
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(file: BinaryIO) -> None:
    """Waits until what was written would survive a loss of power."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of `path`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: object) -> None:
    """Replaces the content of `path` by plain values as indented JSON."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; an empty one where there is none, or the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_unfinished(folder: Path, names: str = "*") -> None:
    """Removes what a process that was killed while it wrote left; none may be writing now.

    `names` is a pattern of the files that were to be.
    """
    for path in folder.glob(f".{names}{UNFINISHED}"):
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of JSON lines, none without it; lines that a kill has cut are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
