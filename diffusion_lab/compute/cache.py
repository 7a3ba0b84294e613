"""Tensors that are computed once and kept on disk under a hash of what they were computed from."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.files import replacing
from diffusion_lab.common.messages import say
from diffusion_lab.compute.distributed import on_rank_zero, rank_and_world

VERSION = 2  # increased when the same key comes to mean other values


def cached(
    folder: str | Path, name: str, key: dict, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Returns the tensors of `compute`, from `folder` if they are there; the same on every rank.

    `key` (plain values) names everything that the tensors depend on; `name` is for people who look
    into the folder. All ranks call this, and `compute`, together. A damaged file is replaced.
    """
    content = json.dumps({"version": VERSION} | key, sort_keys=True)
    path = Path(folder) / f"{name}-{hashing.of_text(content)[:16]}.pt"
    found = on_rank_zero(lambda: _read(path))  # other nodes may not see the first node's disk
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


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        # torch.load does not notice bytes that changed inside a tensor
        return kept["tensors"] if kept["sha256"] == hashing.of_tensors(kept["tensors"]) else None
    except Exception:  # torch.load may raise anything on a damaged file
        return None
