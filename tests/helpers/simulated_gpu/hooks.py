"""Registers GPUs with PyTorch's C++: a device guard, and hooks that say that there are devices."""

import ctypes
import re
from pathlib import Path

import torch

LIBRARIES = Path(torch.__file__).parent
CUDA = 1  # in c10's DeviceType
_kept: list = []  # what C++ points to


def register(devices: int) -> None:
    """Lets PyTorch's C++ believe in this many GPUs."""
    register_guard()
    register_hooks(devices)
    assert torch._C._get_accelerator().type == "cuda", "this PyTorch is not known"


def register_guard() -> None:
    """Registers the guard that does nothing; there is none for CUDA in a CPU-only build."""
    c10 = ctypes.CDLL(str(LIBRARIES / "lib/libc10.so"))
    registry = (ctypes.c_void_p * 32).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if not registry[CUDA]:
        # one that says that it has no devices, which PyTorch replaces by its no-op guard
        registry[CUDA] = pointers([pointers([function(0)] * 64)])
    torch._C._ensureCUDADeviceGuardSet()


def register_hooks(devices: int) -> None:
    """Replaces answers in the table of virtual functions of PyTorch's CUDAHooks."""
    names = [
        *("destructor", "deleting destructor"),
        *virtuals("AcceleratorHooksInterface")[1:],
        *virtuals("CUDAHooksInterface"),
    ]
    cpu = ctypes.CDLL(str(LIBRARIES / "lib/libtorch_cpu.so"))
    cpu._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    hooks = ctypes.cast(cpu._ZN2at6detail12getCUDAHooksEv(), ctypes.POINTER(ctypes.c_void_p))
    before = ctypes.cast(hooks[0] - 16, ctypes.POINTER(ctypes.c_void_p))  # two words of the type
    table = [before[place] or 0 for place in range(2 + len(names))]
    yes = ("isBuilt", "isAvailable", "hasPrimaryContext", "hasCUDA")
    many = ("deviceCount", "getNumGPUs")
    zero = ("init", "setCurrentDevice", "getCurrentDevice", "exchangeDevice", "current_device")
    zero += ("maybeExchangeDevice",)
    answers = dict.fromkeys(yes, 1) | dict.fromkeys(many, devices) | dict.fromkeys(zero, 0)
    for name, answer in answers.items():
        table[2 + names.index(name)] = function(answer)
    hooks[0] = pointers(table) + 16


def virtuals(struct: str) -> list[str]:
    """The virtual functions of a struct in their order, read from PyTorch's header."""
    header = LIBRARIES / f"include/ATen/detail/{struct}.h"
    text = re.sub(r"//.*", "", header.read_text())
    body = text[text.index(f"struct TORCH_API {struct}") :]
    return re.findall(r"virtual\s+[^;{}()]*?(~?\w+)\s*\(", body)


def pointers(values: list[int]) -> int:
    """The address of an array of pointers that stays."""
    array = (ctypes.c_void_p * len(values))(*values)
    _kept.append(array)
    return ctypes.addressof(array)


def function(answer: int) -> int:
    """The address of a C function that returns a number, however it is called."""
    made = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: answer)
    _kept.append(made)
    return ctypes.cast(made, ctypes.c_void_p).value or 0
