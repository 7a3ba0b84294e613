"""Weights in files of other programs."""

import io
import pickle
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.runs import weights


class Stored:
    """An object of another program: the name of its class, and its state without the class."""

    name: str
    state: dict[str, Any]

    def __new__(cls, *arguments: object) -> "Stored":
        found = super().__new__(cls)  # a pickle may leave out __init__
        found.name, found.state = "", {}
        return found

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters and buffers of a module by name, as in its state_dict().

        A module that stands in several places, or in itself, is looked at once.
        """
        left, seen = [("", self)], {id(self)}
        while left:
            prefix, module = left.pop()
            for name, value in (module.entries("_parameters") | module.entries("_buffers")).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
            for name, child in module.entries("_modules").items():
                if isinstance(child, Stored) and id(child) not in seen:
                    seen.add(id(child))
                    left.append((f"{prefix}{name}.", child))

    def entries(self, kind: str) -> dict[str, Any]:
        """A dictionary in the state of a module; an empty one if it has none."""
        found = self.state.get(kind)
        return found if isinstance(found, dict) else {}


def _stored(meta: dict[str, Any]) -> Stored:
    """The object that NVIDIA's `torch_utils.persistence` describes; its source code is ignored."""
    found = Stored()
    found.name = str(meta["class_name"])
    found.__setstate__(meta["state"])
    return found


NAMES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    # gradients and hooks are left out
    "torch._utils._rebuild_tensor_v2": lambda *given: torch._utils._rebuild_tensor(*given[:4]),
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    # the numbers of a tensor, which a pickle holds as a file of torch
    "torch.storage._load_from_bytes": lambda content: torch.load(
        io.BytesIO(content), map_location="cpu", weights_only=True
    ),
    "torch.nn.modules.container.ModuleDict": Stored,
    "torch_utils.persistence._reconstruct_persistent_obj": _stored,
    # numbers and arrays of numpy, which are settings and not weights
    "numpy.dtype": Stored,
    "numpy.ndarray": Stored,
    "numpy.core.multiarray._reconstruct": Stored,
    "numpy.core.multiarray.scalar": Stored,
    "numpy._core.multiarray._reconstruct": Stored,
    "numpy._core.multiarray.scalar": Stored,
}


def load(path: Path) -> Any:
    """Reads a pickle of tensors, plain data and NVIDIA's objects, which become `Stored`.

    Raises UserError for a pickle that needs anything else, before it is executed, or is damaged.
    """

    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Callable[..., Any]:
            if f"{module}.{name}" in NAMES:
                return NAMES[f"{module}.{name}"]
            raise UserError(
                f"{path} needs {module}.{name}, which could be any code; only tensors, plain data "
                "and the networks of EDM are read from pickles"
            )

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the class of storages that files have
            return Plain(file).load()
    except UserError:
        raise
    except Exception as error:  # the content of a damaged or hostile file may fail in any way
        raise UserError(
            f"{path} is damaged, or more than tensors and plain data; get the file again"
        ) from error


State = dict[str, Tensor]
TORCH = (".pt", ".pth", ".ckpt", ".bin")
CHOSEN = ("ema", "state_dict", "model")  # weights in a checkpoint; averaged ones come first


def read(path: Path) -> tuple[State, Stored | None]:
    """Reads the weights in a file of safetensors, torch or EDM; nothing in it is executed.

    Returns them by name, float32 where they are numbers, and the object of EDM that has them, if
    any. Raises UserError for a file that is missing, damaged, or more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a file of weights")
    say(f"Reading {path}")
    if path.suffix == ".safetensors":
        content: Any = weights.read(path, "get the file again")
    elif path.suffix in TORCH:
        content = _of_torch(path)
    elif path.suffix == ".pkl":
        content = load(path)
    else:
        raise UserError(f"{path} must end in .safetensors, .pkl, {', '.join(TORCH[:-1])} or .bin")
    for _ in CHOSEN:  # a checkpoint in a checkpoint; a hostile one may be in itself
        if isinstance(content, dict) and (key := next((k for k in CHOSEN if k in content), None)):
            say(f"Weights: {key} of {path}")
            content = content[key]
    owner = content if isinstance(content, Stored) else None
    tensors = dict(owner.tensors()) if owner else content
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} has no weights; give a file of a whole network")
    if wrong := [key for key, value in tensors.items() if not _is_named_tensor(key, value)]:
        raise UserError(
            f"{path} has {wrong[0]!r}, which names no tensor of numbers; give a file of weights "
            "alone"
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, owner


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
