"""A kind of network that can be imported: how to read its files, and how to rename its weights."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.importing.reading import State

Shape = tuple[int, int, int]
LEARNED_VARIANCE = ("sampler=ddpm", "sampler/time_grid=linspace", "sampler.variance=learned")
IMPROVED_DDPM = ("schedule=ddpm_linear", "objective=improved_ddpm", *LEARNED_VARIANCE)
FIXED_VARIANCE = ("objective/loss/variance=none", "sampler.variance=fixed_small")


@dataclass(frozen=True)
class Imported:
    """A network under our names, and its configuration.

    `file` holds its weights. `tensors` are those of a `Denoiser`, which diffuses `shape` (c, h, w)
    for images of `image_shape` (C, H, W). `overrides` are read off the file, and come after the
    kind's recipe.
    """

    file: Path
    tensors: State
    shape: Shape
    image_shape: Shape
    num_classes: int
    overrides: Sequence[str]


class Kind(ABC):
    """A kind of network; `read` is the one method to write.

    The recipe has the overrides of `train` that are the same for all networks of the kind.
    """

    recipe: ClassVar[Sequence[str]]

    @abstractmethod
    def read(self, path: Path) -> Imported:
        """Reads a network; raises UserError for a file that is not of this kind."""


def assigned(prefix: str, values: Mapping[str, object]) -> list[str]:
    """Overrides that set values, which may be lists and dictionaries, below a key."""
    return [f"{prefix}.{key}={written(value)}" for key, value in values.items()]


def written(value: object) -> str:
    """A plain value in the syntax of overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(each)}" for key, each in value.items()) + "}"
    return json.dumps(verbatim(value)).replace("\\\\", "\\")  # Hydra keeps backslashes


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


def with_null_row(table: Tensor, null: Tensor | None = None) -> Tensor:
    """Appends the row of the null label to a table of labels (N, D); zeros if there is none."""
    row = torch.zeros_like(table[:1]) if null is None else null[None]
    return torch.cat([table, row])


def reorder_attention(ours: State, axes: str, head_channels: int | None, heads: int = 1) -> None:
    """Gives the projections of attention our shape and order of rows, in place.

    `axes` is the order of queries, keys and values in the file: of the three (3), of heads (h), and
    of channels (d); ours is 3hd. None for `head_channels` is `heads` heads.
    """
    order = [axes.index(axis) for axis in "3hd"]
    for name in [name for name in ours if ".attention." in name]:
        if ours[name].ndim > 1:  # a convolution of one pixel
            ours[name] = ours[name].flatten(1)
        if ".qkv." in name:
            number = len(ours[name]) // 3 // head_channels if head_channels else heads
            sizes = {"h": number, "3": 3, "d": -1}
            split = ours[name].unflatten(0, [sizes[axis] for axis in axes])
            ours[name] = split.permute(*order, *range(3, split.ndim)).flatten(0, 2)


def overrides_of(ours: State) -> list[str]:
    """The overrides that give a U-Net the sizes of these weights, and its attention its levels.

    Raises UserError if the width of a level is not a multiple of the first layer's.
    """
    shapes = {name.removeprefix(BACKBONE): tensor.shape for name, tensor in ours.items()}
    levels = count(shapes, r"up\.(\d+)\.")
    blocks = count(shapes, r"up\.0\.stages\.(\d+)\.") - 1

    def stage(level: int, i: int) -> str:
        return f"up.{levels - 1 - level}.stages.{i}"

    channels = shapes["entry.weight"][0]
    widths = [shapes[f"{stage(level, 0)}.residual.conv2.weight"][0] for level in range(levels)]
    if odd := [width for width in widths if width % channels]:
        raise UserError(
            f"a level of {odd[0]} channels is no multiple of the first layer's {channels}, so this "
            "U-Net cannot be imported"
        )
    attends = [
        (level, i)
        for level in range(levels)
        for i in range(blocks + 1)
        if f"{stage(level, i)}.attention.norm.weight" in shapes
    ]
    embedding_width, frequencies = shapes["noise.0.weight"]
    modulation = shapes["down.0.residual.embedding.weight"][0]
    sizes = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "attention": sorted({level for level, _ in attends}),
        "attend_once": bool(attends) and all(i == blocks for _, i in attends),
        "embedding.frequencies": frequencies,
        "embedding.width": embedding_width,
        "stage.scale_shift": modulation == 2 * shapes["down.0.residual.conv1.weight"][0],
    }
    return assigned("backbone", sizes)
