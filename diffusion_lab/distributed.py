"""Work shared over ranks by sample id."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(count: int, rank: int, world: int) -> list[int]:
    """The ids below `count` that are this rank's: every `world`-th, so shards may be uneven."""
    return list(range(rank, count, world))


def gather_by_id(rows: Tensor, ids: Sequence[int]) -> Tensor:
    """The rows (n, ...) of all ranks in the order of their ids, on the CPU, on every rank."""
    world = rank_and_world()[1]
    rows = rows.cpu()
    if world == 1:
        return rows
    shards: list[tuple[Tensor, list[int]]] = [None] * world
    dist.all_gather_object(shards, (rows, list(ids)))
    order = torch.tensor([i for _, shard_ids in shards for i in shard_ids]).argsort()
    return torch.cat([rows for rows, _ in shards])[order]


def from_rank_zero(value: object) -> object:
    """Rank 0's value on every rank."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_ranks(value: object) -> list[object]:
    """The value of each rank, in order, on every rank."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
