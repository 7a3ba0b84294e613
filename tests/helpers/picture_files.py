"""Tiny images in folders and zips, each telling by its value which one it is."""

import io
import json
import zipfile
from pathlib import Path

from PIL import Image


def png(value: int | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    """One colour, or one grey for a number; `size` is (width, height)."""
    stream = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, contents: dict[str, bytes | int]) -> str:
    """Files under `root`, a number being a picture of this grey; the folder's path."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(content) if isinstance(content, int) else content)
    return str(root)


def archive(path: Path, contents: dict[str, bytes | int], labels: object = ...) -> str:
    """A zip with these files, and with `labels` in a dataset.json if there are any; its path."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, png(content) if isinstance(content, int) else content)
        if labels is not ...:
            file.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def numbered(count: int, form: str = "{:02}.png") -> dict[str, int]:
    """Pictures 0, 1, ... of the grey of their number."""
    return {form.format(i): i for i in range(count)}
