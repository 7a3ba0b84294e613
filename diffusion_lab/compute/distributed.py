"""Shares work over ranks by sample id, collects the results, and keeps some of them on disk."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.files import replacing
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute import started

Value = TypeVar("Value")
PATIENCE_WITH_ONE = timedelta(hours=2)  # how long the others wait for what rank 0 computes
SECONDS_TO_BE_ENDED_IN = 10  # in which a launcher ends the other processes after one has failed


class FirstStopped(UserError):
    """The error of the other ranks if rank 0 cannot go on; it is of one line."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(count: int, rank: int, world: int) -> list[int]:
    """The ids below `count` of one rank: every `world`-th, so shards may be uneven."""
    return list(range(rank, count, world))


def own_batches(count: int, size: int) -> list[list[int]]:
    """This rank's ids below `count`, in batches of at most `size`; none is empty."""
    ids = shard(count, *rank_and_world())
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def gather_shards(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all ranks in the order of their ids, (n, ...) on the CPU, on every rank.

    `parts` are the rows (b, ...) of this rank's shard in batches; a rank without ids may have none.
    """
    rank, world = rank_and_world()
    if world == 1:
        return torch.cat(list(parts)).cpu()
    count, everything = sum(of_all_ranks(sum(map(len, parts)))), torch.empty(0)
    # in turn, and put away at once: a rank holds all rows and one shard
    for source in range(min(world, count)):  # ranks without rows are the last
        sent: list[Any] = [torch.cat(list(parts)).cpu() if rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        if source == 0:
            everything = sent[0].new_empty(count, *sent[0].shape[1:])
        everything[source::world] = sent[0]
    return everything


def on_rank_zero(compute: Callable[[], Value]) -> Value:
    """Calls `compute` on rank 0 alone, and returns its result on every rank.

    An error ends every rank, so none is left waiting: the others raise FirstStopped.
    """
    rank, world = rank_and_world()
    if world == 1:
        return compute()
    group = patient_group()
    value: Value | None = None
    failure: Exception | None = None
    if rank == 0:
        try:
            value = compute()
        except Exception as error:  # whatever it is, the others must hear of it
            failure = error
    # the exception itself may not survive being sent
    words = f"{failure}".strip() or type(failure).__name__
    sent: list[Any] = [value, words.splitlines()[0] if failure else None]
    dist.broadcast_object_list(sent, src=0, group=group)
    if failure is not None:
        raise failure
    result, reason = sent
    if reason is not None:
        raise FirstStopped(f"the first process stopped: {reason}")
    return result


@cache
def patient_group() -> dist.ProcessGroup:
    """All ranks as a group that waits long, as metrics of many images take rank 0 a while."""
    group = cast(dist.ProcessGroup, dist.new_group(timeout=PATIENCE_WITH_ONE))
    # NCCL connects at the first call, with the patience of the other groups
    dist.broadcast_object_list([None], src=0, group=group)
    return group


@cache
def writers_group() -> dist.ProcessGroup:
    """All ranks as a group of threads that write while others train, with tensors on the CPU."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def of_all_ranks(value: Value) -> list[Value]:
    """The value of each rank, in order, on every rank."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Raises an error of a kind on every rank if the block raises one on any; none is left waiting.

    All ranks must enter the block.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = type(error), str(error)
    if first := next(filter(None, of_all_ranks(failure)), None):
        same, message = first
        raise same(message)


def another_ended(error: BaseException) -> bool:
    """Whether an error says only that another rank has ended, or does not answer."""
    broken = isinstance(error, dist.DistError) or "gloo" in str(error)
    return isinstance(error, RuntimeError) and broken


def first_to_fail() -> bool:
    """Whether this process is the first to ask of all that were started; it then says why.

    Before they are connected, all will fail alike, so the others leave it to rank 0.
    """
    if rank_and_world()[1] == 1:
        time.sleep(SECONDS_TO_BE_ENDED_IN if started.rank() else 0)
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has ended with the rank that kept it
        return False


CACHE_VERSION = 2  # increased when the same key comes to mean other values


def cached(
    folder: str | Path, name: str, key: dict, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Returns the tensors of `compute`, from `folder` if they are there; the same on every rank.

    `key` (plain values) names everything that the tensors depend on; `name` is for people who look
    into the folder. All ranks call this, and `compute`, together. A damaged file is replaced.
    """
    content = json.dumps({"version": CACHE_VERSION} | key, sort_keys=True)
    path = Path(folder) / f"{name}-{hashing.of_text(content)[:16]}.pt"
    # other nodes may not see the first node's disk
    found = on_rank_zero(lambda: _read_cached(path))
    if found is not None:
        return found
    tensors = compute()
    if rank_and_world()[0] == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save({"tensors": tensors, "sha256": hashing.of_tensors(tensors)}, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's for a full disk
            say(f"{path} could not be written, so it will be computed again next time: {error}")
    return tensors


def _read_cached(path: Path) -> dict[str, Tensor] | None:
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        # torch.load does not notice bytes that changed inside a tensor
        return kept["tensors"] if kept["sha256"] == hashing.of_tensors(kept["tensors"]) else None
    except Exception:  # torch.load may raise anything on a damaged file
        return None
