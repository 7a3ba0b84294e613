"""Files that are complete and correct or absent: checksums, atomic installation, clear errors."""

import contextlib
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diffusion_lab.common.files import one_at_a_time

LOCK = ".lock"  # in the folder of a data set
CHUNK, LARGEST = 2**20, 2**28  # bytes: read at once, and of a file of these data sets at most


class DataError(ValueError):
    """A data set's files are missing or damaged; the message says how to fix that."""


class SourceUnavailable(Exception):
    """A source cannot provide the files; the message says why, and the next source is tried."""


class Damaged(SourceUnavailable):
    """A file is truncated, no valid gzip file, or has the wrong checksum."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason})")


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder in `folder`, to one process at a time; removes empty folders."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with one_at_a_time(folder / LOCK):
            for leftover in folder.glob(".fetch-*"):  # left by a process that was killed
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                yield Path(scratch)
    finally:
        if created and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
        for path in created:
            with contextlib.suppress(OSError):  # the folder is not empty
                path.rmdir()


def missing(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names the `files` (name: checksum) that `folder` lacks; a wrong file in it raises Damaged."""
    present = [name for name in files if (folder / name).is_file()]
    for name in present:
        check(folder / name, files[name])
    return [name for name in files if name not in present]


def check(path: Path, checksum: str, source: Path | None = None) -> None:
    """Raises Damaged, which names `source` if given, unless the file has this md5 or sha256."""
    method = "md5" if len(checksum) == 32 else "sha256"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(method, usedforsecurity=False))
    if digest.hexdigest() != checksum:
        raise Damaged(source or path, "its checksum is wrong")


def install(stream: IO[bytes], source: Path, target: Path, checksum: str, scratch: Path) -> None:
    """Copies `stream`, opened from the file `source`, to `target`, if it has this checksum.

    Raises Damaged, which names `source`, if not; `scratch` is a folder on `target`'s file system.
    """
    temporary = scratch / target.name
    try:
        with temporary.open("wb") as file:
            while chunk := stream.read(CHUNK):
                file.write(chunk)
                if file.tell() > LARGEST:
                    raise Damaged(source, f"it unpacks to more than {LARGEST:,} bytes")
    except EOFError as error:
        raise Damaged(source, "it is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(source, "it is not a valid gzip file") from error
    check(temporary, checksum, source)
    os.replace(temporary, target)
