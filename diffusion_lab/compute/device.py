"""What the device at hand does best: device, precision, compilation."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusion_lab.common.messages import UserError

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
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_info("flags").split())
    return False


def cpu_info(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" where the kernel does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")


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


def device_and_precision(device: str, precision: str) -> tuple[torch.device, str]:
    """Picks the device and a precision for work outside a Trainer; raises UserError."""
    picked = pick_device(device)
    precision = pick_precision(precision, picked)
    autocast(precision, picked)  # refuses a precision that it does not know
    return picked, precision


def pays(choice: bool | str, device: torch.device) -> bool:
    """Whether to compile, or to keep weights channels last: as told, or for `auto` on a GPU.

    There a run outlasts the compilation; on a CPU the U-Net works channels last whatever this says,
    as its norms are written for it.
    """
    return device.type == "cuda" if choice == "auto" else choice is True


class PeakMemory:
    """The most memory that a run has had in training; what is done meanwhile can be left out.

    Of tensors on a GPU; on a CPU, under Linux, of the process, which in a sweep trains one run
    after another.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before: int | None = 0  # the peak of what was trained before the last stop
        self._reset()

    def bytes(self) -> int | None:
        """None where it cannot be told from what else the process has done."""
        before, since = self._before, self._since_reset()
        return None if before is None or since is None else max(before, since)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out what a block needs."""
        self._before = self.bytes()
        try:
            yield
        finally:
            self._reset()

    def _reset(self) -> None:
        self._known = False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._known = True
            return
        with contextlib.suppress(AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)  # what is no longer used
        with contextlib.suppress(OSError):  # not everywhere
            OWN_MEMORY.with_name("clear_refs").write_text("5")
            self._known = True

    def _since_reset(self) -> int | None:
        if not self._known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = OWN_MEMORY.read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line[:6] == "VmHWM:"), None)


def check_choices(**choices: bool | str) -> None:
    """Raises UserError unless each is true, false or auto."""
    for name, choice in choices.items():
        if choice not in (True, False, "auto"):
            raise UserError(f"{name}={choice} is unknown; use auto, true or false")
