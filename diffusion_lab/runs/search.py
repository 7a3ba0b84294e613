"""Walks through folders in search of runs."""

import os
from collections.abc import Iterator
from pathlib import Path


def walk(path: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields the folders at and below a path, each once, with the names of its folders and files.

    Symbolic links are followed, and hidden folders left out. As in `os.walk`, the folders that the
    caller removes from the list are not visited.
    """
    seen = set()
    for name, folders, files in os.walk(path, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:  # reached before, by a symbolic link
            folders.clear()
            continue
        seen.add(folder.resolve())
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield folder, folders, files
