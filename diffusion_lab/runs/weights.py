"""The weights of a trained denoiser: in the checkpoint of a run, exported from it, in snapshots.

A snapshot, snapshots/step_*.safetensors in the run folder, has averages of LENGTHS
(diffusion/power_average.py), of which any other average is made after training, as
"<length>/<name>", by the names of the network's parameters, and the network's other tensors as
"buffers/<name>". A checkpoint holds that of its step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import averages, checkpoints, migrate
from diffusion_lab.runs.averages import NO_AVERAGE
from diffusion_lab.runs.checkpoints import AVERAGES, TRAINED
from diffusion_lab.runs.current import EXPORTED

PREFIX, OTHER = "denoiser.", "model."  # begin names of weights that draw: of diffusion, and others
SNAPSHOTS = "snapshots"  # the folder inside the run folder
LENGTHS = (0.05, 0.1)  # sigma_rel of the averages in a snapshot, as in arXiv:2312.02696
BUFFERS = "buffers"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class WeightsChoice:
    """The weights of a run, or of an export, that are asked for.

    `average` is NO_AVERAGE, the name of an average that the run kept or that was made of it, or
    None for the one that it evaluates, which is NO_AVERAGE if it kept none. `checkpoint` is an
    intact one, or None for the newest.
    """

    folder: Path
    average: str | None = None
    checkpoint: Path | None = None


def load_weights(choice: WeightsChoice) -> tuple[Tensors, dict[str, str]]:
    """Loads the weights of the network that draws; returns them and the facts of their export.

    Raises UserError if there is no such average, or if the weights are missing or damaged.
    """
    folder, average = choice.folder, choice.average
    if (folder / EXPORTED).is_file():  # an export or an import
        if average is not None:
            raise UserError(
                f"average={average} cannot be chosen in {folder}, an export, which has one set of "
                "weights; leave average out, or export the run again with it"
            )
        return read(folder / EXPORTED, "export the run again"), facts_of(folder)
    path = choice.checkpoint or checkpoints.newest_intact(folder)
    checkpoints.say_if_older(folder, path)
    content = checkpoints.read(path)
    state, kept = content["state_dict"], content.get(AVERAGES, {})
    step = content["global_step"]
    facts = {"average": average or "evaluated", "step": str(step), "run": folder.resolve().name}
    if average == NO_AVERAGE:
        state = content.get(TRAINED, state)
    elif average in kept:
        state = state | kept[average]
    elif average is not None:
        made = averages.find(folder, average, step, [NO_AVERAGE, *kept])
        tensors = read(made / EXPORTED, "make the average again")
        return tensors, facts | {"step": str(averages.step_of(made))}
    weights = {
        migrate.today(name.partition(".")[2]): value
        for name, value in state.items()
        if name.startswith((PREFIX, OTHER))
    }
    return weights, facts


def load_into(network: nn.Module, state: Tensors, folder: str | Path) -> None:
    """Gives a network the weights of the run `folder`; raises UserError if they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {folder} do not fit its configuration: they are of another model"
        ) from error


def read(path: Path, remedy: str) -> Tensors:
    """Reads a file of weights; if it is damaged, raises UserError, which ends with `remedy`."""
    try:
        found = safetensors.torch.load_file(path)
        return {migrate.today(name): value for name, value in found.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def facts_of(folder: str | Path) -> dict[str, str]:
    """The facts that an export or an import keeps beside its weights."""
    with safe_open(Path(folder) / EXPORTED, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != "format"}


def save_snapshot(run: Path, step: int, tensors: Tensors, dtype: str) -> None:
    """Writes the snapshot of a step, whole or not at all; averages are stored as `dtype`.

    Raises OSError, for example if the disk is full.
    """
    stored = {
        name: (value if name.startswith(f"{BUFFERS}/") else value.to(DTYPES[dtype])).cpu()
        for name, value in tensors.items()
    }
    contiguous = {name: value.contiguous() for name, value in stored.items()}
    (run / SNAPSHOTS).mkdir(exist_ok=True)
    path = run / SNAPSHOTS / f"step_{step:07d}.safetensors"
    write_atomically(path, safetensors.torch.save(contiguous))


def snapshot_paths(run: Path) -> dict[int, Path]:
    """The files of a run's snapshots by step, in order."""
    found = (run / SNAPSHOTS).glob("step_*.safetensors")
    return dict(sorted((int(path.stem.removeprefix("step_")), path) for path in found))


def drop_snapshots_after(run: Path, step: int) -> None:
    """Deletes the snapshots of later steps, which a run that is resumed takes again."""
    for later, path in snapshot_paths(run).items():
        if later > step:
            path.unlink()


def snapshots_of(run: Path) -> tuple[int, dict[int, Callable[[], Tensors]]]:
    """The step of a run's newest intact checkpoint, and functions that read the snapshots by step.

    There are none after that step. Raises UserError if no checkpoint is intact, and a function does
    if its snapshot is damaged.
    """
    checkpoint = checkpoints.read(checkpoints.newest_intact(run))
    last = checkpoint["global_step"]
    remedy = "delete it, and the others make the average less exactly"
    found: dict[int, Callable[[], Tensors]] = {
        step: partial(read, path, remedy)
        for step, path in snapshot_paths(run).items()
        if step <= last
    }
    if own := checkpoint.get(checkpoints.SNAPSHOT):
        found[last] = lambda: own
    return last, found
