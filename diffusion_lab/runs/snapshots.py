"""Snapshots of averages of a run's weights, of which any other average is made after training.

They are snapshots/step_*.safetensors in the run folder, and a checkpoint holds that of its step.
A snapshot has averages of LENGTHS (diffusion/power_average.py) as "<length>/<name>", by the names
of the network's parameters, and the network's other tensors as "buffers/<name>".
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import checkpoints

FOLDER = "snapshots"  # inside the run folder
LENGTHS = (0.05, 0.1)  # sigma_rel of the averages in a snapshot, as in arXiv:2312.02696
BUFFERS = "buffers"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
Tensors = dict[str, Tensor]


def save(run: Path, step: int, tensors: Tensors, dtype: str) -> None:
    """Writes the snapshot of a step, whole or not at all; averages are stored as `dtype`.

    Raises OSError, for example if the disk is full.
    """
    stored = {
        name: value if name.startswith(f"{BUFFERS}/") else value.to(DTYPES[dtype])
        for name, value in tensors.items()
    }
    contiguous = {name: value.cpu().contiguous() for name, value in stored.items()}
    (run / FOLDER).mkdir(exist_ok=True)
    write_atomically(
        run / FOLDER / f"step_{step:07d}.safetensors", safetensors.torch.save(contiguous)
    )


def paths_of(run: Path) -> dict[int, Path]:
    """The files of a run's snapshots by step, in order."""
    found = (run / FOLDER).glob("step_*.safetensors")
    return dict(sorted((int(path.stem.removeprefix("step_")), path) for path in found))


def drop_after(run: Path, step: int) -> None:
    """Deletes the snapshots of later steps, which a run that is resumed takes again."""
    for later, path in paths_of(run).items():
        if later > step:
            path.unlink()


def of_run(run: Path) -> tuple[int, dict[int, Callable[[], Tensors]]]:
    """The step of a run's newest intact checkpoint, and functions that read the snapshots by step.

    There are none after that step. Raises UserError if no checkpoint is intact, and a function does
    if its snapshot is damaged.
    """
    path = checkpoints.newest_intact(run)
    checkpoint = checkpoints.read(path)
    last = checkpoint["global_step"]
    found: dict[int, Callable[[], Tensors]] = {
        step: partial(read, path) for step, path in paths_of(run).items() if step <= last
    }
    if own := checkpoint.get(checkpoints.SNAPSHOT):
        found[last] = lambda: own
    return last, found


def read(path: Path) -> Tensors:
    """Reads a snapshot; raises UserError if it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it, and the others make the average less "
            "exactly"
        ) from error
