"""The processes of a run, one per device: started here, or by the user's torchrun or srun."""

import logging
import os
import signal
import sys
import uuid
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion_lab.common.messages import TrainingStopped, UserError
from diffusion_lab.compute import slurm, started
from diffusion_lab.compute.device import pick_device

SECONDS_TO_STOP_IN = 3600  # a second Ctrl-C stops at once
# how long a process waits for the others before it gives up: in steps, and before the first, for
# which each compiles its network and reads its data
PATIENCE, PATIENCE_AT_START = timedelta(minutes=10), timedelta(hours=1)


def accelerator_of(trainer: DictConfig) -> str:
    """Returns `cuda` or `cpu`, as `trainer.accelerator` says, or for `auto` as the machine has."""
    name = {"gpu": "cuda"}.get(trainer.accelerator, trainer.accelerator)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"trainer.accelerator={name} is not supported; use auto, gpu or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but no GPU is visible; use trainer=cpu")
    return name


def processes(trainer: DictConfig) -> tuple[int, int]:
    """The number of processes per node, one per device, and the number of nodes.

    If srun or torchrun has started the processes, `auto` stands for their number. Raises UserError
    if another number was asked for.
    """
    nodes = trainer.num_nodes
    if nodes != "auto" and not (type(nodes) is int and nodes >= 1):
        raise UserError(f"trainer.num_nodes={nodes} must be auto or a whole number of at least 1")
    if not started.in_launched_process():
        return devices_per_node(trainer), 1 if nodes == "auto" else nodes
    devices, there = started.processes_started()
    asked = devices if trainer.devices == "auto" else devices_per_node(trainer)
    if (asked, there if nodes == "auto" else nodes) != (devices, there):
        raise UserError(
            f"trainer.devices={trainer.devices} and trainer.num_nodes={nodes} differ from what was "
            f"started, {devices} on each of {there} nodes; leave both out, or start that many "
            "(with hydra/launcher=slurm: hydra.launcher.tasks_per_node and nodes)"
        )
    if accelerator_of(trainer) == "cuda":
        require_gpus()
    return devices, there


def processes_of_command(device: str, devices: int | str) -> int:
    """The number of processes per node of a command on a trained run, one per device.

    If srun or torchrun has started the processes, `auto` stands for their number. Raises UserError
    if another number was asked for, or more than there are GPUs.
    """
    on_gpus, single = pick_device(device).type == "cuda", ":" in device
    if started.in_launched_process():
        count, _ = started.processes_started()
        if devices not in ("auto", count):
            raise UserError(
                f"devices={devices} differs from what was started, {count} on each node; leave it "
                "out, or start that many"
            )
    elif devices != "auto":
        count = int(devices)
        if on_gpus and count > (there := torch.cuda.device_count()):
            raise UserError(f"devices={count} is more than the {there} GPUs; leave it out for all")
    else:
        count = torch.cuda.device_count() if on_gpus and not single else 1
    if single and count > 1:
        raise UserError(
            f"device={device} is one device, not {count}; write device={device.split(':')[0]}"
        )
    return count


def require_gpus() -> None:
    """Raises UserError unless a GPU is visible for each of the processes started on this node."""
    processes, _ = started.processes_started()
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes were started on this node, but {torch.cuda.device_count()} "
            "GPUs are visible to this one; request gpus_per_node instead of gpus_per_task"
        )


def devices_per_node(trainer: DictConfig) -> int:
    """The number of devices per node that a configuration asks for."""
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
    """The device of this process, assigned as Lightning does: by the rank in the node."""
    if accelerator_of(trainer) == "cpu":
        return torch.device("cpu")
    rank, devices = started.local_rank(), trainer.devices
    return torch.device("cuda", devices[rank] if isinstance(devices, ListConfig) else rank)


def run_on_all_devices(command: str, arguments: list[str], processes: int) -> bool:
    """Runs `diffusion-lab <command> <arguments>` in one process per device and waits for them.

    Each job of a sweep thus has its own group of processes, and if one of them dies, the rest of
    the group is stopped. Returns False if a signal stopped them, after they had saved. Raises
    TrainingStopped if they failed; a process that was not killed has printed the reason.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            # messages about its workers mean nothing to users of this program
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # asked to stop, workers finish a step or validation and save; torchrun would kill them sooner
    defaults = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_STOP_IN),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
    }
    added = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in added})
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
        elastic_launch(config, sys.executable)("-m", "diffusion_lab", command, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            end = f"was killed by {signal.Signals(-failure.exitcode).name}"
        else:
            end = f"ended with code {failure.exitcode}, for the reason printed above"
        raise TrainingStopped(f"process {rank} {end}, and the others were stopped") from error
    except SignalException:
        return False  # passed on to the processes, which have saved and said how to resume
    finally:
        for name in added:  # what this process starts later is not one of several
            os.environ.pop(name, None)
    return True


def cluster() -> Any:
    """Returns Lightning's environment for whatever started the processes of this run.

    Lightning itself would take a batch script for one of srun's tasks, and warn wherever srun is
    installed.
    """
    from lightning.fabric.plugins import environments

    if started.by_torchrun():  # also inside a SLURM job
        return environments.TorchElasticEnvironment()
    if not slurm.started_by_srun():
        return environments.LightningEnvironment()
    # `srun --ntasks` does not set it
    os.environ["SLURM_NTASKS_PER_NODE"] = str(started.processes_started()[0])
    with warnings.catch_warnings(action="ignore"):
        return environments.SLURMEnvironment(auto_requeue=False)  # else its signal handler saves


def join_process_group(device: torch.device) -> None:
    """Connects launched processes; those of training before Lightning does, to decide together."""
    started.let_rank_zero_speak()
    if device.type == "cuda":
        if started.in_launched_process():
            require_gpus()
        torch.cuda.set_device(device)  # NCCL sends objects through the current device
    if not started.in_launched_process() or dist.is_initialized():
        return
    environment = cluster()
    if environment.world_size() == 1:
        return
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=PATIENCE_AT_START,
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )


def expect_steps() -> None:
    """Waits for other processes no longer than a step takes, from now on."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
