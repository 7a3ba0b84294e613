"""A reader of pickles that takes tensors and plain data out of them, and executes nothing.

A pickle names functions to call and classes to build. Here each name stands for a harmless function
of this file, and any other name is refused. NVIDIA's networks (EDM, EDM2) are such pickles: an
object is the source code of its class and its state, and only the state is kept.
"""

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.common.messages import UserError


class Refused(Exception):
    """The error for a name that a pickle may not use."""


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
            for kind in ("_parameters", "_buffers"):
                for name, value in module.entries(kind).items():
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


def _storage(content: bytes) -> torch.TypedStorage:
    """The numbers of a tensor, which a pickle holds as a file of torch."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(
    storage: torch.TypedStorage, offset: int, size: tuple, stride: tuple, *rest: object
) -> Tensor:
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage.untyped(), offset, size, stride)


def _parameter(data: Tensor, *rest: object) -> Tensor:
    return data


NAMES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
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


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if f"{module}.{name}" not in NAMES:
            raise Refused(f"{module}.{name}")
        return NAMES[f"{module}.{name}"]


def load(path: Path) -> Any:
    """Reads a pickle of tensors, plain data and NVIDIA's objects, which become `Stored`.

    Raises UserError for a pickle that needs anything else, before it is executed, or is damaged.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the class of storages that files have
            return _PlainUnpickler(file).load()
    except Refused as error:
        raise UserError(
            f"{path} needs {error}, which could be any code; only tensors, plain data and the "
            "networks of EDM are read from pickles"
        ) from error
    except Exception as error:  # the content of a damaged or hostile file may fail in any way
        raise UserError(
            f"{path} is damaged, or more than tensors and plain data; get the file again"
        ) from error
