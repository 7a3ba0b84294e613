"""Folders of results that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffusion_lab.common.messages import UserError


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
