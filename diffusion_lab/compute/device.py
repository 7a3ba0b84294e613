"""Picks the device, precision and compilation for this machine, and measures peak memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import AUTO, Range, one_of, optional
from diffusion_lab.compute.started import in_launched_process, local_rank

# of torch.compile, besides its default; `layers` compiles each of a network's layers by itself
MODES = ("layers", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE = Range(
    f"auto, true, false, {', '.join(MODES[:-1])} or {MODES[-1]}",
    lambda value: AUTO.allows(value) or value in MODES,
)
CHOICES = {"compile": COMPILE, "channels_last": AUTO}  # the keys of `pays`
PRODUCTS = optional(one_of("highest", "high", "medium"))  # the argument of `float32_products`
OWN_MEMORY = Path("/proc/self/status")


def pick_device(name: str) -> torch.device:
    """Picks a device by name; `auto` is a GPU if there is any. Raises UserError for a bad name.

    If torchrun or srun has started a process for each device, `auto` and `cuda` are its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))  # a bare number would be a GPU
    except RuntimeError as error:
        raise UserError(f"device={name} is not a torch device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} was requested, but no GPU is visible; use device=cpu")
    if device.type == "cuda" and device.index is None and in_launched_process():
        return torch.device("cuda", local_rank())
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware here; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_info("flags").split())


def cpu_info(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" where the kernel does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")


def pick_precision(precision: str, device: torch.device) -> str:
    """Lightning's precision; `auto` is bf16-mixed where the device has it, else float32.

    Raises UserError for 16-mixed on a CPU, where Lightning would train in bf16 instead.
    """
    if precision == "16-mixed" and device.type == "cpu":
        raise UserError("trainer.precision=16-mixed needs a GPU; write bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    return "bf16-mixed" if has_fast_bf16(device) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast block for a precision, for sampling outside a Trainer."""
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(
            f"precision={precision} is not supported here; use auto, 32-true or bf16-mixed"
        )
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def device_and_precision(device: str, precision: str) -> tuple[torch.device, str]:
    """Picks device and precision for work outside a Trainer; raises UserError for unknown ones."""
    picked = pick_device(device)
    precision = pick_precision(precision, picked)
    autocast(precision, picked)  # raises UserError for an unknown precision
    return picked, precision


@contextlib.contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Sets how exact products of float32 matrices and convolutions are in this block.

    `highest` is float32, `high` is TF32 on a GPU and `medium` bfloat16 inside of matrix products.
    None is as it was: PyTorch's own default is float32 for matrices and TF32 for convolutions.
    """
    before = float32_precision()
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(str(before["matmul_precision"]))
        torch.backends.cudnn.allow_tf32 = bool(before["convolutions_in_tf32"])


def float32_precision() -> dict[str, str | bool]:
    """The facts that `float32_products` sets."""
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "convolutions_in_tf32": torch.backends.cudnn.allow_tf32,
    }


def pays(choice: bool | str, device: torch.device) -> bool:
    """Whether to compile, or to keep weights channels last: as chosen, or for `auto` on a GPU.

    On a GPU a run outlasts the compilation. On a CPU the U-Net works channels last in any case, as
    its norms are written for that layout.
    """
    return device.type == "cuda" if choice == "auto" else choice is not False


def mode_of(choice: bool | str) -> str | None:
    """The mode of compilation that a choice names; None for torch.compile's default."""
    return choice if isinstance(choice, str) and choice in MODES else None


class PeakMemory:
    """Measures the peak memory of a run's training, and can leave out other work.

    On a GPU it counts tensors; on a CPU, under Linux, it is the peak of the process, which in a
    sweep trains one run after another.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before: int | None = 0  # the peak of training before the last stop
        self._reset()

    def bytes(self) -> int | None:
        """The peak in bytes; None if other work of the process cannot be left out."""
        before, since = self._before, self._since_reset()
        return None if before is None or since is None else max(before, since)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out the memory that a block needs."""
        self._before = self.bytes()
        try:
            yield
        finally:
            self._reset()

    def _reset(self) -> None:
        self._known = self.device.type == "cuda"
        if self._known:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # returns unused memory to the system
        with contextlib.suppress(OSError):  # not writable everywhere
            OWN_MEMORY.with_name("clear_refs").write_text("5")
            self._known = True

    def _since_reset(self) -> int | None:
        if not self._known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = OWN_MEMORY.read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line[:6] == "VmHWM:"), None)
