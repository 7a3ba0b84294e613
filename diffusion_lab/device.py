"""What the device at hand does best: device, precision, compilation."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from diffusion_lab.errors import UserError

OWN_MEMORY = Path("/proc/self/status")


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; any torch device name is taken as it is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is no torch device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} was asked for, but no GPU is visible; use device=cpu")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware here; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))
    return False


def _cpu_flags() -> frozenset[str]:
    """Instruction sets by their Linux names; empty where the kernel does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def pick_precision(precision: str, device: torch.device) -> str:
    """Lightning's precision; `auto` is bf16-mixed where the device has it, else float32."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if has_fast_bf16(device) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast block for a precision, for sampling outside a Trainer."""
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={precision} is unknown here; use auto, 32-true or bf16-mixed")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def compile_pays(choice: bool | str, device: torch.device) -> bool:
    """Whether to compile: as told, or for `auto` on a GPU, where a run outlasts the compilation."""
    return device.type == "cuda" if choice == "auto" else choice


def channels_last_pays(choice: bool | str, device: torch.device) -> bool:
    """Whether weights are kept channels last: as told, or for `auto` on a GPU.

    On a CPU the U-Net works channels last whatever this says: its norms are written for it.
    """
    return device.type == "cuda" if choice == "auto" else choice


def reset_peak_memory(device: torch.device) -> None:
    """Begins what `peak_memory` looks back on; a process of a sweep trains several runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif OWN_MEMORY.exists():
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)  # what the run before has freed
        with contextlib.suppress(OSError):  # not in every container
            OWN_MEMORY.with_name("clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most since the reset: of tensors on a GPU, of the process on a CPU under Linux.

    None elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not OWN_MEMORY.exists():
        return None
    lines = OWN_MEMORY.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def check_choices(**choices: bool | str) -> None:
    """Raises UserError unless each is true, false or auto."""
    for name, choice in choices.items():
        if choice not in (True, False, "auto"):
            raise UserError(f"{name}={choice} is unknown; use auto, true or false")
