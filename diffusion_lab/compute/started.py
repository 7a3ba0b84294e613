"""Finds out from the environment what started this process: a person, torchrun or srun."""

import ctypes
import os
import re
import signal
import sys

from diffusion_lab.common.messages import UserError, console
from diffusion_lab.compute import slurm

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def by_torchrun() -> bool:
    """Whether torchrun, ours or the user's, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_launched_process() -> bool:
    """Whether torchrun or srun has already started one process per device."""
    return by_torchrun() or slurm.started_by_srun()


def rank() -> int:
    """The rank of this process among all that were started together, 0 if it is alone."""
    if by_torchrun():  # also inside a SLURM job
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if slurm.started_by_srun() else 0


def local_rank() -> int:
    """The rank of this process on its node, 0 if it is alone."""
    if by_torchrun():
        return int(os.environ["LOCAL_RANK"])
    return int(os.environ["SLURM_LOCALID"]) if slurm.started_by_srun() else 0


def processes_started() -> tuple[int, int]:
    """The numbers of processes per node and of nodes that torchrun or srun has started."""
    if by_torchrun():
        a_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return a_node, int(os.environ["WORLD_SIZE"]) // a_node
    layout = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # as in 4(x2)
    if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", layout)):
        raise UserError(
            f"srun has started different numbers of processes on the nodes of this job, {layout}; "
            "write srun --ntasks-per-node=..."
        )
    return int(match[1]), int(match[2] or 1)


def in_a_group() -> bool:
    """Whether torchrun or srun has started several processes, this one among them."""
    return (int(os.environ["WORLD_SIZE"]) if by_torchrun() else slurm.tasks()) > 1


def end_with_launcher() -> None:
    """Lets Linux ask this process to stop, by SIGTERM, when the torchrun that started it dies.

    Otherwise training would go on, without end if it is alone, after the launcher was killed.
    """
    if by_torchrun() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def let_rank_zero_speak() -> None:
    """Silences all ranks but 0, from the start, as this needs no process group."""
    console.quiet = rank() != 0
