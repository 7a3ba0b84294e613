"""Values that are computed once into a file and mapped into memory, which keeps none of them.

A store is a file of raw values and a JSON beside it, which is written last: without it there is no
store. The system reads a page of the file when it is used, and drops it when memory is short.
"""

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.files import (
    one_at_a_time,
    read_json,
    remove_unfinished,
    replacing,
    write_json,
)
from diffusion_lab.common.messages import say

VERSION = 1  # increased when the same key comes to mean other values

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # makes zeros of a shape


class StoredValues(NamedTuple):
    """Values (N, ...), and plain facts about them."""

    values: Tensor
    facts: dict[str, Any]


def stored(
    folder: str | Path, name: str, key: dict[str, Any], compute: Callable[[Allocate], StoredValues]
) -> StoredValues:
    """Maps the values of `compute` from a file in `folder`, which is written if it is not there.

    `compute` returns the first rows of the only tensor that it allocates. `key` (plain values)
    names everything that they depend on; `name` is for people who look into the folder. Processes
    that ask at the same time wait for the first, which computes. A damaged file is replaced. The
    values that are returned cannot be written to. Raises OSError if the file cannot be written.
    """
    key = {"version": VERSION, "key": key}
    stem = f"{name}-{hashing.of_text(json.dumps(key, sort_keys=True))[:16]}"
    path = Path(folder) / f"{stem}.bin"
    if found := _opened(path):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path.with_name(f".{stem}.lock")) as alone:
        if found := _opened(path):  # by the process that was waited for
            return found
        if alone:  # else another process may be writing its own
            remove_unfinished(path.parent, f"{stem}*")
        write_json(path.with_suffix(".json"), key | _written(path, compute))
    if found := _opened(path):
        return found
    raise OSError(f"{path} was changed while it was written")


def _opened(path: Path) -> StoredValues | None:
    """Opens a store; None if it is missing or damaged.

    The checksum is computed only if the file has another time than when it was written.
    """
    known = read_json(path.with_suffix(".json"))
    if not known or not path.is_file():
        return None
    shape, dtype = tuple(known["shape"]), np.dtype(known["dtype"])
    size = math.prod(shape) * dtype.itemsize
    found = path.stat()
    changed = found.st_size != size or (
        found.st_mtime_ns != known["mtime_ns"] and hashing.of_file(path) != known["sha256"]
    )
    if changed:
        say(f"{path} is damaged and will be written again")
        return None
    array = np.memmap(path, dtype, "r", shape=shape)
    with warnings.catch_warnings():
        # private pages, which could be written to, would count as memory of the process
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return StoredValues(torch.from_numpy(array), known["facts"])


def _written(path: Path, compute: Callable[[Allocate], StoredValues]) -> dict[str, Any]:
    """Writes the values that are computed; returns what the JSON says about them."""
    with replacing(path) as file:

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            numbers = torch.empty(0, dtype=dtype).numpy().dtype
            # reserved now: a mapped file on a full disk would end the process by a signal
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
            return torch.from_numpy(np.memmap(file.name, numbers, "r+", shape=shape))

        values, facts = compute(allocate)
        size, shape, kind = values.nbytes, list(values.shape), str(values.numpy().dtype)
        del values
        file.truncate(size)
    checksum, written = hashing.of_file(path), path.stat().st_mtime_ns
    return {"shape": shape, "dtype": kind, "facts": facts, "sha256": checksum, "mtime_ns": written}


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocates the zeros that `stored` would map, for values that are in no file."""
    return torch.zeros(shape, dtype=dtype)
