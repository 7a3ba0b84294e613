"""A kind of network that can be imported: how to read its files, and how it was made."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.importing.reading import State

Shape = tuple[int, int, int]
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
