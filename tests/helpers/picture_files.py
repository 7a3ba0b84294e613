"""Writes tiny images to folders and zips; the grey value of an image identifies it."""

import io
import json
import zipfile
from pathlib import Path

from PIL import Image


def png(value: int | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG of one colour, or of one grey for a number; `size` is (width, height)."""
    stream = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, contents: dict[str, bytes | int]) -> str:
    """Writes files under `root`, a number as a picture of that grey; returns the path."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(content) if isinstance(content, int) else content)
    return str(root)


def archive(path: Path, contents: dict[str, bytes | int], labels: object = ...) -> str:
    """Writes these files to a zip, with `labels` in a dataset.json if given; returns the path."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, png(content) if isinstance(content, int) else content)
        if labels is not ...:
            file.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def numbered(count: int, form: str = "{:02}.png") -> dict[str, int]:
    """The names of pictures 0, 1, ..., each with its number as its grey."""
    return {form.format(i): i for i in range(count)}
