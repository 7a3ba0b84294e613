"""Trees of tensors in a folder of files, of which each rank writes and reads its share.

The files are those of torch.distributed.checkpoint. A sharded tensor is put together by whatever
number of ranks reads it, and a tensor that is the same on all ranks is written once.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.utils._pytree import keystr, tree_map_with_path

PLACE = "tensor at "  # begins the words that are in a tree in place of a tensor
SHARED = "shared "  # begins the place of one of which each rank had some rows


def take_apart(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree with words in place of its tensors, and the tensors by their places.

    A tensor that is in several places is kept once.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}  # by the id of a tensor

    def word(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = keys.setdefault(
            id(value), f"{SHARED if isinstance(value, DTensor) else ''}{keystr(path)}"
        )
        tensors[key] = value
        return f"{PLACE}{key}"

    return tree_map_with_path(word, tree), tensors


def put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `take_apart` took apart."""

    def tensor(path: Any, value: Any) -> Any:
        placed = isinstance(value, str) and value.startswith(PLACE)
        return tensors[value.removeprefix(PLACE)] if placed else value

    return tree_map_with_path(tensor, tree)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors into a folder; all ranks call this together.

    Raises an OSError, or on all ranks a CheckpointException, for example if the disk is full.
    """
    with warnings.catch_warnings(action="ignore"):  # of a single process
        dcp.save(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())


def read(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a folder, whole and on the CPU.

    With a mesh, of those that were sharded it reads this rank's rows; all ranks call it together.
    """
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata

    def room(key: str, found: TensorStorageMetadata) -> Tensor:
        if mesh is None or not key.startswith(SHARED):
            return torch.empty(found.size, dtype=found.properties.dtype)
        return zeros(
            *found.size, dtype=found.properties.dtype, device_mesh=mesh, placements=[Shard(0)]
        )

    tensors = {key: room(key, each) for key, each in known.items()}  # type: ignore[arg-type]
    with warnings.catch_warnings(action="ignore"):  # of a single process
        dcp.load(tensors, checkpoint_id=folder, no_dist=mesh is None)
    return tensors
