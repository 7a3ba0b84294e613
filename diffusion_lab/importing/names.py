"""Names of weights: those of another program by tables, and what can be read off ours."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffusion_lab.common.messages import UserError
from diffusion_lab.importing.reading import State

LABELS = "conditioning.embeddings.0.weight"  # a row for each class, then one for no class
BACKBONE = "backbone."


def renamed(tensors: State, modules: Mapping[str, str]) -> State:
    """The weights under our names, by a table of the names of modules.

    Raises UserError for a module that is not in the table.
    """
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            raise UserError(f"the file has {name}, which no network of this kind has")
        found[f"{BACKBONE}{modules[module]}.{leaf}"] = tensor
    return found


def joined(outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    """The table of all modules inside of others: each name in `outer`, then each in `inner`."""
    return {f"{a}.{c}": f"{b}.{d}" for a, b in outer.items() for c, d in inner.items()}


def numbers(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that the pattern's group finds in names."""
    found = (re.match(pattern, name) for name in names)
    return {int(match[1]) for match in found if match}


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers the pattern's group finds in names; those of layers have no gaps."""
    return len(numbers(names, pattern))


def by_head(heads: int, axes: str, weight: Tensor) -> Tensor:
    """Reorders the rows of a projection to queries, keys and values in all heads, as ours has them.

    `axes` is their order in the file: of heads (h), the three (3), and channels (d).
    """
    sizes = {"h": heads, "3": 3, "d": -1}
    split = weight.unflatten(0, [sizes[axis] for axis in axes])
    order = [axes.index(axis) for axis in "3hd"]
    return split.permute(*order, *range(3, split.ndim)).flatten(0, 2)


def with_null_row(table: Tensor, null: Tensor | None = None) -> Tensor:
    """Appends the row of the null label to a table of labels (N, D); zeros if there is none."""
    row = torch.zeros_like(table[:1]) if null is None else null[None]
    return torch.cat([table, row])
