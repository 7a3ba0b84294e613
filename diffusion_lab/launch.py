"""Several processes: one a device, started by torchrun, or found already started."""

import logging
import os
import signal
import sys
import uuid
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig, ListConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion_lab.errors import Stopped, UserError

PATIENCE = timedelta(minutes=10)  # how long a process waits for the others before it gives up


def accelerator_of(trainer: DictConfig) -> str:
    """`cuda` or `cpu`, as `trainer.accelerator` says or as the machine has it."""
    name = {"gpu": "cuda"}.get(trainer.accelerator, trainer.accelerator)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"trainer.accelerator={name} is not supported; use auto, gpu or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but no GPU is visible; use trainer=cpu")
    return name


def devices_per_node(trainer: DictConfig) -> int:
    """How many processes a node runs: one a device."""
    devices = trainer.devices
    if isinstance(devices, ListConfig) and devices:
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return torch.cuda.device_count() if accelerator_of(trainer) == "cuda" else 1
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UserError(
            f"trainer.devices={devices} must be auto, a number of at least 1, or a list as in [0,2]"
        )
    return int(devices)


def device_of_process(trainer: DictConfig) -> torch.device:
    """The device of this process, the way Lightning deals them out: by the rank in the node."""
    if accelerator_of(trainer) == "cpu":
        return torch.device("cpu")
    rank = cluster().local_rank() if in_launched_process() else 0
    devices = trainer.devices
    return torch.device("cuda", devices[rank] if isinstance(devices, ListConfig) else rank)


def in_launched_process() -> bool:
    """Whether torchrun (ours or the user's) or srun has already started a process a device."""
    with warnings.catch_warnings(action="ignore"):  # of an srun that is installed and not used
        return TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


def run_on_all_devices(command: str, overrides: list[str], processes: int) -> None:
    """Runs `diffusion-lab <command> <overrides>` in one process a device and waits for them.

    A job of a sweep is so a group of processes of its own, and one that dies takes the rest of its
    group with it. Raises Stopped if they failed; they have said why, unless they were killed.
    """
    # what it tells of its workers is for those who know it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
        if failure.exitcode < 0:
            end = f"was killed by {signal.Signals(-failure.exitcode).name}"
        else:
            end = f"ended with code {failure.exitcode}, for what it said above"
        raise Stopped(f"process {rank} {end}, and the others were ended") from error
    except SignalException as error:
        # handed to the processes, which have saved and said how to go on
        raise KeyboardInterrupt from error


def cluster() -> ClusterEnvironment:
    """What started the processes of this run."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()


def join_process_group(device: torch.device) -> None:
    """Connects the processes of a launched run before Lightning does, for what must be agreed."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL sends objects through the current device
    if not in_launched_process() or dist.is_initialized():
        return
    environment = cluster()
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=PATIENCE,
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )
