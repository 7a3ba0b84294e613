"""Weights in files of other programs."""

import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.importing import pickles
from diffusion_lab.importing.pickles import Stored
from diffusion_lab.runs import weights

State = dict[str, Tensor]
TORCH = (".pt", ".pth", ".ckpt", ".bin")
CHOSEN = ("ema", "state_dict", "model")  # weights in a checkpoint; averaged ones come first


@dataclass(frozen=True)
class FoundWeights:
    """The weights in a file by name, float32 where they are numbers.

    `name` and `settings` are of the object that has them, where the file says more than weights.
    """

    tensors: State
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> FoundWeights:
    """Reads the weights in a file of safetensors, torch or EDM; nothing in it is executed.

    Raises UserError for a file that is missing, damaged, or more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a file of weights")
    say(f"Reading {path}")
    if path.suffix == ".safetensors":
        content: Any = weights.read(path, "get the file again")
    elif path.suffix in TORCH:
        content = _of_torch(path)
    elif path.suffix == ".pkl":
        content = pickles.load(path)
    else:
        raise UserError(f"{path} must end in .safetensors, .pkl, {', '.join(TORCH[:-1])} or .bin")
    for _ in CHOSEN:  # a checkpoint in a checkpoint; a hostile one may be in itself
        if isinstance(content, dict) and (key := next((k for k in CHOSEN if k in content), None)):
            say(f"Weights: {key} of {path}")
            content = content[key]
    name, state = (content.name, content.state) if isinstance(content, Stored) else (None, {})
    tensors = dict(content.tensors()) if isinstance(content, Stored) else content
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} has no weights; give a file of a whole network")
    if wrong := [key for key, value in tensors.items() if not _is_named_tensor(key, value)]:
        raise UserError(
            f"{path} has {wrong[0]!r}, which names no tensor of numbers; give a file of weights "
            "alone"
        )
    numbers = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    return FoundWeights(numbers, name, state)


def _is_named_tensor(name: object, value: object) -> bool:
    is_whole = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return is_whole and isinstance(name, str)


def _of_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # the arguments of a training script
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message suggests to execute the file
        raise UserError(
            f"{path} holds more than tensors and plain data, or is damaged; give a file of weights "
            "alone"
        ) from error
    except Exception as error:  # the content of a damaged or hostile file may fail in any way
        raise UserError(f"{path} is damaged; get the file again") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings in a JSON file; raises UserError if there are none."""
    if not (found := read_json(path)):
        raise UserError(f"{path} is missing or damaged; get the folder again")
    return found
