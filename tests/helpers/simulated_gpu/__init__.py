"""GPUs that are not there: `torch.device("cuda")` in a CPU-only build of PyTorch.

    from helpers import simulated_gpu
    simulated_gpu.install(devices=1)  # before the first backward pass of the process

Then autograd, autocast, GradScaler, fused and foreach optimisers, DDP, FSDP and Lightning run as on
a GPU, and the CPU computes the numbers (`nccl` is gloo on them). As a GPU would, this one refuses
operations on tensors of several devices, and `.numpy()`; and it refuses files whose tensors the
program loads to a GPU because it names no device. `counts` counts operations, collectives, and the
operations for which the host would wait. Not simulated: memory, speed, streams, limits of kernels,
torch.compile (which is switched off), and processes forked after the first backward pass.

hooks.py makes PyTorch's C++ believe in GPUs, tensors.py has their tensors, torch_cuda.py replaces
what asks a driver, and counts.py counts. All rest on PyTorch's internals by name, so `install`
raises on any other version than those in VERSIONS; `missing` says why it would.
"""

import os
import platform
import warnings

import torch

from helpers.simulated_gpu import hooks, tensors, torch_cuda

VERSIONS = ("2.13",)


def missing() -> str:
    """The reason why there can be no simulated GPU in this process, or nothing."""
    found = torch.__version__
    if not found.startswith(tuple(f"{version}." for version in VERSIONS)):
        return f"GPUs are simulated with PyTorch {', '.join(VERSIONS)}, and this is {found}"
    if torch.version.cuda or torch.version.hip:
        return "GPUs are simulated in a CPU-only build of PyTorch"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "GPUs are simulated on Linux x86-64"
    return ""


def install(devices: int = 1) -> None:
    """Makes this many GPUs, for the rest of the process."""
    if reason := missing():
        raise RuntimeError(reason)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    hooks.register(devices)
    warnings.filterwarnings("ignore", ".*Overriding a previously registered kernel.*")
    warnings.filterwarnings("ignore", ".*Warning only once for all operators.*")
    torch_cuda.replace(devices)
    tensors.register()
