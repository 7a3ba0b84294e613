"""Tensors of a simulated GPU: wrappers whose numbers are a tensor on the CPU."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types as optimized_together
from torch.utils._foreach_utils import _foreach_supported_types as together
from torch.utils._mode_utils import no_dispatch

from helpers.simulated_gpu import counts, files

# operations after which the host must know a value or a shape
WAITING = frozenset(
    f"aten::{name}"
    for name in (
        *("nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "equal"),
        *("_local_scalar_dense", "is_nonzero", "bincount", "repeat_interleave", "histc"),
        *("linalg_eigh", "_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_cholesky_ex"),
    )
)
INDEXING = frozenset(
    f"aten::{name}"
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)
COPYING = frozenset(f"aten::{name}" for name in ("copy_", "_to_copy", "set_", "_foreach_copy_"))
RESHAPING = frozenset(
    f"aten::{name}" for name in ("resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_")
)
EMPTY = frozenset(
    f"aten::{name}"
    for name in ("empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "resize_", "set_")
)
# operations that take a number from a tensor () on the CPU, besides pointwise ones
SCALARS = frozenset(("aten::where", "aten::_fused_adamw_", "aten::_fused_adam_"))
current = 0  # the device of tensors that name none
_kept: list = []  # the library of kernels, which lasts as long as it is held


class DeviceMixed(RuntimeError):
    """An operation has tensors of several devices, which a GPU refuses."""


class SimulatedTensor(Tensor):
    """A tensor on a GPU; `numbers` are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, index: int | None = None):
        index = current if index is None else index
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=torch.device("cuda", index),
        )
        made.numbers = numbers
        return made

    def __repr__(self, **_) -> str:
        return f"SimulatedTensor({self.numbers!r})"

    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return SimulatedTensor(inner["numbers"])

    def __reduce_ex__(self, protocol):
        numbers = files.tagged(self.numbers.clone(), self.device)
        return numbers.requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = SimulatedTensor(self.numbers.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def tolist(self):
        counts.wait("tolist")
        return self.numbers.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def set_device(device: torch.device | str | int) -> None:
    """Makes this device the current one."""
    global current
    current = device if isinstance(device, int) else (torch.device(device).index or 0)


def on_gpu(value: object) -> bool:
    """Whether this is a tensor of a simulated GPU."""
    return isinstance(value, SimulatedTensor)


def plain(value: Any) -> Any:
    """The value with the numbers in place of tensors of a simulated GPU, also in lists."""
    if isinstance(value, SimulatedTensor):
        return value.numbers
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def tensors_in(values: Iterable) -> Iterator[Tensor]:
    """The tensors among values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class Operation:
    """Facts on an operation, from its schema."""

    def __init__(self, func):
        schema = func._schema
        self.name = schema.name
        self.is_collective = self.name.startswith("c10d::")
        self.is_pointwise = torch.Tag.pointwise in func.tags
        self.is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        self.arguments = [each.name for each in schema.arguments]
        aliases = {
            tuple(sorted(each.alias_info.before_set)): each.name
            for each in schema.arguments
            if each.alias_info is not None and each.alias_info.is_write
        }
        shared = [each.alias_info for each in schema.returns if each.alias_info is not None]
        self.is_view = bool(shared)
        # the others only describe memory, or take some
        self.launches = self.name not in EMPTY and not (
            shared and not any(each.is_write for each in shared)
        )
        # the arguments that are changed and returned
        self.changed = [aliases[tuple(sorted(each.before_set))] for each in shared if each.is_write]


operation_of = cache(Operation)


def dispatch(func, args: tuple, kwargs: dict) -> Any:
    """Does an operation on the numbers, and wraps what comes of it."""
    known = operation_of(func)
    inference = torch.is_inference_mode_enabled()
    if inference and known.is_composite:
        return func.decompose(*args, **kwargs)  # elsewhere autograd has done so
    counts.operations[known.name] += known.launches
    if known.name in RESHAPING:
        return reshaped(func, args, kwargs)
    every = list(tensors_in((*args, *kwargs.values())))
    gpu, cpu = [e for e in every if on_gpu(e)], [e for e in every if not on_gpu(e)]
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    look_at_waits(known.name, args, kwargs, cpu, wanted)
    look_at_devices(known, args, gpu, cpu)
    plain_kwargs = {name: plain(value) for name, value in kwargs.items()}
    if wanted is not None and wanted.type == "cuda":
        plain_kwargs["device"] = "cpu"
    result = func(*map(plain, args), **plain_kwargs)
    if known.name == "aten::copy_" and not on_gpu(args[0]):
        return args[0]
    if wanted is not None and wanted.type != "cuda":
        return result
    if known.changed:
        named = dict(zip(known.arguments, args, strict=False)) | kwargs
        values = tuple(named[each] for each in known.changed)
        return values[0] if len(values) == 1 else values
    if known.is_collective:
        return (args[0], result[1]) if isinstance(result, tuple) else result
    index = wanted.index if wanted is not None else gpu[0].device.index if gpu else None
    if known.is_view and inference and not any(each.is_inference() for each in gpu):
        with torch.inference_mode(False):  # a view of an ordinary tensor is one
            return wrapped(result, index)
    return wrapped(result, index)


def wrapped(value: Any, index: int | None) -> Any:
    """The value with tensors of this GPU in place of their numbers."""
    if isinstance(value, Tensor):
        return SimulatedTensor(value, index)
    if isinstance(value, list | tuple):
        return type(value)(wrapped(each, index) for each in value)
    return value


def look_at_waits(name: str, args: tuple, kwargs: dict, cpu: list[Tensor], wanted) -> None:
    """Counts an operation for which the host waits."""
    if name in WAITING:
        counts.wait(name)
    elif name == "aten::_to_copy" and wanted is not None and wanted.type == "cpu":
        counts.wait("copy to the CPU")
    elif name == "aten::copy_" and cpu:
        if not on_gpu(args[0]):
            counts.wait("copy to the CPU")
        elif not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            counts.wait("copy to the GPU")
    elif name in INDEXING:
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            counts.wait(f"{name} by a mask")
        if on_gpu(args[0]) and not all(map(on_gpu, indices)):
            counts.wait(f"{name} by indices on the CPU")


def look_at_devices(known: Operation, args: tuple, gpu: list[Tensor], cpu: list[Tensor]) -> None:
    """Raises DeviceMixed for an operation that a GPU refuses."""
    name = known.name
    if name in COPYING or known.is_collective:
        return
    if cpu and name in INDEXING and on_gpu(args[0]):  # indices may be on the CPU
        cpu = [each for each in cpu if each.ndim and not any(each is i for i in args[1])]
    elif cpu and (known.is_pointwise or name in SCALARS):
        cpu = [each for each in cpu if each.ndim]
    if (gpu and cpu) or len({each.device.index for each in gpu}) > 1:
        found = ", ".join(f"{tuple(e.shape)} on {e.device}" for e in (*gpu, *cpu))
        raise DeviceMixed(f"{name} expects all tensors on one device, and has {found}")


def reshaped(func, args: tuple, kwargs: dict) -> Any:
    """Changes a tensor's shape in place, and that of its wrapper as well."""
    func(*map(plain, args), **kwargs)
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)
    return args[0]


def maker(make):
    """A kernel that makes tensors on a GPU as `make` does on the CPU."""

    def made(*args, device=None, pin_memory=None, layout=None, **kwargs):
        counts.operations[f"aten::{make.__name__}"] += not make.__name__.startswith("empty")
        if kwargs.get("memory_format", 0) is None:
            del kwargs["memory_format"]
        index = torch.device(device).index if device is not None else None
        return SimulatedTensor(make(*args, device="cpu", **kwargs), index)

    return made


def register() -> None:
    """Registers the kernels that make tensors where there is none yet to dispatch on."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", maker(torch.empty), "CUDA")
    library.impl("empty_strided", maker(torch.empty_strided), "CUDA")
    library.impl("_efficientzerotensor", maker(torch.zeros), "CUDA")
    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, maker(torch.arange), "CUDA")
    for name in ("linspace", "randperm", "eye"):
        library.impl(name, maker(getattr(torch, name)), "CUDA")
    _kept.append(library)
    optimized_together.append(SimulatedTensor)  # lists of these are worked on together
    together.append(SimulatedTensor)
    # a moved parameter stays the same object, as it does on a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
