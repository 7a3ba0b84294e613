"""The variables by which torchrun and srun tell a process its rank, and forks of a process."""

import multiprocessing
from collections.abc import Callable

# the variables of the second task on the second of two nodes, with two tasks each
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "node[3-4]",
}
TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}


def exit_codes_of_three(call: Callable[[], object]) -> list[int | None]:
    """The exit codes of three forks of this process that make a call at the same time."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    return [process.exitcode for process in processes]
