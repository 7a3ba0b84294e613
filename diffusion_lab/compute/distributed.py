"""Shares work over ranks by sample id, and collects the results."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_lab.common.messages import UserError

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(count: int, rank: int, world: int) -> list[int]:
    """The ids below `count` of one rank: every `world`-th, so shards may be uneven."""
    return list(range(rank, count, world))


def gather_by_id(rows: Tensor, ids: Sequence[int]) -> Tensor:
    """The rows (n, ...) of all ranks in the order of their ids, on the CPU, on every rank."""
    world = rank_and_world()[1]
    rows = rows.cpu()
    if world == 1:
        return rows
    shards: list[Any] = [None] * world  # (rows, ids) of each rank
    dist.all_gather_object(shards, (rows, list(ids)))
    order = torch.tensor([i for _, shard_ids in shards for i in shard_ids]).argsort()
    return torch.cat([rows for rows, _ in shards])[order]


def on_rank_zero(compute: Callable[[], Value]) -> Value:
    """Calls `compute` on rank 0 alone, and returns its result on every rank.

    An error ends every rank, so none is left waiting: the others raise a UserError of one line.
    """
    rank, world = rank_and_world()
    if world == 1:
        return compute()
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
    dist.broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    result, reason = sent
    if reason is not None:
        raise UserError(f"the first process stopped: {reason}")
    return result


def of_all_ranks(value: object) -> list[object]:
    """The value of each rank, in order, on every rank."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
