"""Folders of results: written whole or not at all, and never over the files of others."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffusion_lab.common.messages import UserError


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
