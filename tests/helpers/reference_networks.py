"""Small networks of the original authors' code: their weights, inputs and outputs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from helpers.paths import TESTS

FOLDER = TESTS / "golden/networks"


def drawn(shapes: Mapping[str, list[int]], std: float = 0.05) -> dict[str, Tensor]:
    """Random tensors that are the same everywhere; weights of norms, and gains, are around 1."""
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        values = np.random.RandomState(seed).standard_normal(shape)  # a stream that numpy froze
        centre = float(not shape or (len(shape) == 1 and name.endswith("weight")))
        found[name] = torch.tensor(centre + std * values, dtype=torch.float32)
    return found


def images(shape: list[int], sigma: Tensor | None = None) -> Tensor:
    """The noisy images (B, C, H, W) that a network is given, at the levels sigma (B,) of EDM."""
    x = drawn({"x": shape}, 1.0)["x"]
    return x if sigma is None else x * (sigma + 0.5)[:, None, None, None]


@dataclass(frozen=True)
class Reference:
    """A network's weights under their original names, and its inputs and outputs by name."""

    state: dict[str, Tensor]
    io: dict[str, Tensor]

    @classmethod
    def whole(cls, path: Path) -> "Reference":
        """Reads a file that has all of these."""
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "io": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        return cls(**parts)

    @classmethod
    def stored(cls, name: str) -> "Reference":
        """Reads the network `name` of FOLDER, and draws the weights and inputs it leaves out."""
        path = FOLDER / f"{name}.safetensors"
        found = cls.whole(path)
        with safe_open(path, "pt") as file:
            said = {key: json.loads(text) for key, text in file.metadata().items()}
        state = found.state | drawn(said["shapes"])
        return cls(state, found.io | {"x": images(said["images"], found.io.get("sigma"))})
