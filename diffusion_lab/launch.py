"""Several processes: one a device, started by torchrun, or found already started."""

import os
import sys
import uuid

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion_lab.errors import UserError


def accelerator_of(trainer: DictConfig) -> str:
    """`cuda`, `mps` or `cpu`, as `trainer.accelerator` says or as the machine has it."""
    name = {"gpu": "cuda"}.get(trainer.accelerator, trainer.accelerator)
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but no GPU is visible; use trainer=cpu")
    return name


def devices_per_node(trainer: DictConfig) -> int:
    """How many processes a node runs: one a device."""
    devices = trainer.devices
    if not isinstance(devices, str | int):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count() if accelerator_of(trainer) == "cuda" else 1
    return int(devices)


def in_launched_process() -> bool:
    """Whether torchrun (ours or the user's) or srun has already started a process a device."""
    return TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


def run_on_all_devices(command: str, overrides: list[str], processes: int) -> None:
    """Runs `diffusion-lab <command> <overrides>` in one process a device and waits for them.

    A job of a sweep is so a group of processes of its own, and one that dies takes the rest of its
    group with it. Raises UserError if they failed; they have said why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "diffusion_lab", command, *overrides)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise UserError(
            f"training process {rank} ended with code {failure.exitcode}, and the others were "
            "stopped; what it said is above"
        ) from error
    except SignalException:
        pass  # Ctrl-C and SIGTERM are handed to the processes, which save and say how to go on


def join_process_group(device: str) -> None:
    """Connects the processes of a launched run before Lightning does, for what must be agreed."""
    if not in_launched_process() or dist.is_initialized():
        return
    slurm = SLURMEnvironment.detect()
    environment = SLURMEnvironment() if slurm else TorchElasticEnvironment()
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )
