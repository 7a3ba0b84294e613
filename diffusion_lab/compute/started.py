"""What started this process, as its environment says it: a person, torchrun or srun."""

import os

from diffusion_lab.common import messages
from diffusion_lab.compute import slurm


def by_torchrun() -> bool:
    """Whether torchrun, ours or the user's, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_launched_process() -> bool:
    """Whether torchrun or srun has already started a process a device."""
    return by_torchrun() or slurm.started_by_srun()


def rank() -> int:
    """The rank of this process among all that were started together, 0 if it is alone."""
    if by_torchrun():  # also within a job of SLURM
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if slurm.started_by_srun() else 0


def let_rank_zero_speak() -> None:
    """Hides what the other ranks say, from the start: no process group is needed."""
    messages.speak(rank() == 0)
