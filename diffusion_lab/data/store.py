"""Values that are computed once into a file and mapped into memory, which keeps none of them.

A store is a file of raw values and a JSON beside it, which is written last: without it there is no
store. The system reads a page of the file when it is used, and drops it when memory is short.
"""

import glob
import json
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.common import files, hashing
from diffusion_lab.common.messages import say
from diffusion_lab.compute.distributed import rank_and_world

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
    path = _place(folder, name, key)
    if found := _opened(path):
        return found
    with _alone(path) as alone:
        if found := _opened(path):  # by the process that was waited for
            return found
        if alone:  # else another process may be writing its own
            files.remove_unfinished(path.parent, f"{glob.escape(path.stem)}*")
        about = {"version": VERSION, "key": key} | _written(path, compute)
        files.write_json(path.with_suffix(".json"), about)
        if found := _opened(path):  # before one who waits can remove it
            return found
    raise OSError(f"{path} was changed while it was written")


def stored_by_ranks(
    folder: str | Path,
    name: str,
    key: dict[str, Any],
    count: int,
    unit: int,
    compute: Callable[[range, Allocate], StoredValues],
) -> StoredValues:
    """Like `stored`, of `count` rows of which each rank computes a range, a multiple of `unit`.

    Ranks write their rows beside the store, and the first that is done puts all together. It takes
    those that another is computing when that is done, so no rank waits for another's call; rows
    that no rank has written here, as on another node's disk, it computes itself.
    """
    rank, world = rank_and_world()
    edges = [min(count, -(-count // unit) * i // world * unit) for i in range(world + 1)]
    rows = [range(start, stop) for start, stop in pairwise(edges)]
    parts = [(f"{name}-from-{r.start}", {**key, "rows": [r.start, r.stop]}) for r in rows]

    def part(i: int) -> Tensor:
        return stored(folder, *parts[i], partial(compute, rows[i])).values

    def together(allocate: Allocate) -> StoredValues:
        found = [part(i) for i in range(world) if rows[i]]
        values = allocate((count, *found[0].shape[1:]), found[0].dtype)
        return StoredValues(torch.cat(found, out=values), {})

    if world == 1:
        return stored(folder, name, key, partial(compute, range(count)))
    if rows[rank] and not _opened(_place(folder, name, key)):
        part(rank)
    found = stored(folder, name, key, together)
    for each in parts:
        path = _place(folder, *each)
        if path.exists():
            with suppress(OSError), _alone(path):  # the rank that wrote it has opened it
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
    return found


def _place(folder: str | Path, name: str, key: dict[str, Any]) -> Path:
    """The file of values that a key names."""
    text = json.dumps({"version": VERSION, "key": key}, sort_keys=True)
    return Path(folder) / f"{name}-{hashing.of_text(text)[:16]}.bin"


def _alone(path: Path) -> AbstractContextManager[bool]:
    """Waits until no other process writes or removes a store."""
    return files.one_at_a_time(path.with_name(f".{path.stem}.lock"))


def _opened(path: Path) -> StoredValues | None:
    """Opens a store; None if it is missing or damaged, as its checksum tells if its time is new."""
    known = files.read_json(path.with_suffix(".json"))
    if not known:
        return None
    shape, dtype = tuple(known["shape"]), np.dtype(known["dtype"])
    size = math.prod(shape) * dtype.itemsize
    try:
        found = path.stat()
        changed = found.st_size != size or (
            found.st_mtime_ns != known["mtime_ns"] and hashing.of_file(path) != known["sha256"]
        )
        if changed:
            say(f"{path} is damaged and will be written again")
            return None
        array = np.memmap(path, dtype, "r", shape=shape)
    except FileNotFoundError:  # another rank may be removing it
        return None
    with warnings.catch_warnings():
        # private pages, which could be written to, would count as memory of the process
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return StoredValues(torch.from_numpy(array), known["facts"])


def _written(path: Path, compute: Callable[[Allocate], StoredValues]) -> dict[str, Any]:
    """Writes the values that are computed; returns what the JSON says about them."""
    with files.replacing(path) as file:

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
