"""Counts the operations, waits and collectives of a simulated GPU."""

import sys
import warnings
from collections import Counter
from pathlib import Path

from helpers.paths import ROOT

PROGRAM, TESTS = f"{ROOT}/diffusion_lab/", f"{ROOT}/tests/"
LIGHTNING = "/lightning/"
HERE = str(Path(__file__).parent)
NOWHERE = "elsewhere"
COLLECTIVES = ("c10d::", "_c10d_functional::")
operations: Counter[str] = Counter()  # by name; those that launch a kernel, about
waits: Counter[str] = Counter()  # of the host for the GPU, by operation and place in the code
debug_mode: str | int = "default"  # of torch.cuda.set_sync_debug_mode


def set_debug_mode(mode: str | int) -> None:
    global debug_mode
    debug_mode = mode


def reset() -> None:
    """Counts from nothing."""
    operations.clear()
    waits.clear()


def kernels() -> int:
    """The number of operations of one GPU by itself."""
    return sum(operations.values()) - sum(
        count for name, count in operations.items() if name.startswith(COLLECTIVES)
    )


def collectives() -> int:
    """The number of operations of all ranks together."""
    return sum(
        count
        for name, count in operations.items()
        if name.startswith(COLLECTIVES) and not name.endswith(("wait", "wait_tensor"))
    )


def wait(operation: str) -> None:
    """Notes that the host waits for the GPU here."""
    if debug_mode in ("warn", 1):
        warnings.warn(f"called a synchronizing CUDA operation: {operation}", stacklevel=3)
    elif debug_mode in ("error", 2):
        raise RuntimeError(f"called a synchronizing CUDA operation: {operation}")
    file, function = place()
    if file != NOWHERE:  # DDP's own threads copy sums of gradients, which gloo has on the CPU
        waits[f"{operation} in {function}, {file}"] += 1


def place() -> tuple[str, str]:
    """The file and the function of the program, or else of Lightning or a test, that runs now."""
    frame, other = sys._getframe(1), (NOWHERE, "")
    while frame:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PROGRAM):
            return str(Path(file).relative_to(ROOT)), function
        if other[0] == NOWHERE and LIGHTNING in file:
            other = (f"lightning/{file.rpartition(LIGHTNING)[2]}", function)
        if other[0] == NOWHERE and file.startswith(TESTS) and not file.startswith(HERE):
            other = (str(Path(file).relative_to(ROOT)), function)
        frame = frame.f_back
    return other
