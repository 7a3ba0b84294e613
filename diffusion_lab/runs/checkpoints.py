"""The checkpoints of a run: the last one and the one before it, each written atomically.

A checkpoint is a torch zip file of tensors and plain data. Damage is found by the checksums of the
zip file, which torch itself does not verify. The tensors of one in shards are in a folder beside
the file, which names it, and are found damaged if a file of theirs has another size. They are files
of torch.distributed.checkpoint, of which each rank writes and reads its share: whatever number of
ranks reads a sharded tensor puts it together, and one that is the same on all is written once.
"""

import errno
import itertools
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.utils._pytree import keystr, tree_map_with_path

from diffusion_lab.common import files
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute.distributed import writers_group
from diffusion_lab.runs.files import LAST, PREVIOUS

FOLDER = LAST.parent  # inside the run folder
DAMAGED = FOLDER / "damaged.ckpt"
# keys of a checkpoint besides state_dict, which holds the weights that a run evaluates: the trained
# weights if those are an average (a key of Lightning's), and all averages by name
TRAINED, AVERAGES = "current_model_state", "averages"
SHARDS = "shards"  # the folder of a checkpoint's tensors and its files' sizes, and its name's begin
SNAPSHOT = "snapshot"  # and the snapshot of its step (runs/weights.py)
LINK = f".{PREVIOUS.name}{files.UNFINISHED}"  # a temporary hard link, to be renamed


def save(checkpoint: dict, path: Path) -> None:
    """Writes `path` once the new file is complete; the old one becomes previous.ckpt beside it.

    Raises OSError, for example if the disk is full, and then leaves both files unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        torch.save(checkpoint, file)
        files.to_disk(file)
        if path.exists():
            previous, link = (path.with_name(name) for name in (PREVIOUS.name, LINK))
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # the file system has no hard links
                link = path
            os.replace(link, previous)


def new_shards(run: Path, step: int) -> Path:
    """The folder for the tensors of a checkpoint of `step`, which is not there yet."""
    folders = (run / FOLDER / f"{SHARDS}_{step:07d}_{count}" for count in itertools.count())
    return next(folder for folder in folders if not folder.exists())


def drop_shards(run: Path) -> None:
    """Removes folders of tensors that no checkpoint names; no process may be writing one.

    None is removed as long as a checkpoint cannot be read.
    """
    known = set()
    for path in (run / FOLDER).glob("*.ckpt"):
        if path.name != DAMAGED.name:
            try:
                known.add(_content(path).get(SHARDS, {}).get("folder"))
            except Exception:  # torch.load raises errors of all kinds
                return
    for folder in (run / FOLDER).glob(f"{SHARDS}_*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


def read(path: Path, mesh: DeviceMesh | None = None) -> dict:
    """Reads a checkpoint, with whole tensors, or with this rank's rows over a mesh if in shards."""
    content = _content(path)
    if found := content.pop(SHARDS, None):
        return put_together(content, read_shards(path.parent / found["folder"], mesh))
    return content


def _content(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def exists(run: str | Path) -> bool:
    """Whether a run has saved a checkpoint."""
    return any((Path(run) / name).is_file() for name in (LAST, PREVIOUS))


def newest_intact(run: str | Path) -> Path:
    """The last checkpoint of a run, or the one before it if the last is damaged or missing.

    Raises UserError if there is no checkpoint, if all are damaged, or if one cannot be read.
    """
    found = [path for name in (LAST, PREVIOUS) if (path := Path(run) / name).is_file()]
    if not found:
        raise UserError(f"{run} has no {LAST} yet; wait for its first checkpoint")
    faults = []
    for path in found:
        if (reason := fault(path)) is None:
            return path
        faults.append(f"{path} {reason}")
    raise UserError(
        f"{' and '.join(faults)}, and there is no other checkpoint; train the run again"
    )


def step_of(run: str | Path) -> int:
    """The step of a run's newest intact checkpoint; raises UserError if there is none."""
    return step_in(newest_intact(run))


def step_in(checkpoint: Path) -> int:
    """The step of an intact checkpoint."""
    return _content(checkpoint)["global_step"]


def say_if_older(run: str | Path, used: Path) -> None:
    """Says why the last checkpoint is not used, if `used` is the one before it."""
    last = Path(run) / LAST
    if used.name != PREVIOUS.name:
        return
    reason = fault(last) if last.exists() else "is missing"
    say(f"{last} {reason}; the previous checkpoint, {used}, is used instead")


def fault(path: Path) -> str | None:
    """Why a file is no intact checkpoint, found by reading every byte of it; None if it is one.

    The words follow the name of the file, and nothing in it is executed.
    Raises UserError if the file cannot be read: that may be temporary and does not show damage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if member := archive.testzip():
                return f"is damaged (the checksum of its part {member} is wrong)"
        # checks the structure; with mmap the numbers themselves are not read
        content = _content(path)
    except pickle.UnpicklingError:  # with right checksums; torch's words advise to execute the file
        return "was not opened, as it holds more than tensors and plain data and could run code"
    except MemoryError as error:
        raise UserError(f"there is too little memory to read {path}") from error
    except Exception as error:  # zipfile and torch raise errors of all kinds
        # damage may make them seek to an invalid position, which is EINVAL or has no errno
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{path} cannot be read ({error.strerror}); try again later") from error
        return f"is damaged ({(str(error) or type(error).__name__).splitlines()[0].rstrip('.')})"
    if not _is_of_a_run(content):
        return "is not a checkpoint of a run"
    if not (found := content.get(SHARDS)):
        return None
    folder = path.parent / found["folder"]
    for name, size in found["sizes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"is damaged ({folder / name} is missing or has another size)"
    return None


def _is_of_a_run(content: object) -> bool:
    """Whether the content of a file has the parts of a checkpoint that commands read."""
    if not isinstance(content, dict) or type(content.get("global_step")) is not int:
        return False
    averages, kinds = content.get(AVERAGES, {}), (Tensor, str) if SHARDS in content else Tensor
    weights = [content.get("state_dict"), *(content.get(key, {}) for key in (TRAINED, SNAPSHOT))]
    weights += averages.values() if isinstance(averages, dict) else [averages]
    return all(
        isinstance(each, dict)
        and all(isinstance(name, str) and isinstance(v, kinds) for name, v in each.items())
        for each in weights
    )


def resume_from(run: Path) -> Path:
    """Returns the newest intact checkpoint, and removes what a killed process left unfinished.

    The run must be locked. Raises UserError if there is no intact checkpoint.
    """
    intact, last = newest_intact(run), run / LAST
    say_if_older(run, intact)
    if intact != last and last.exists():
        os.replace(last, run / DAMAGED)  # else the next save would replace the intact one with it
    for folder in (run, run / FOLDER):
        files.remove_unfinished(folder)
    for folder in run.glob("*/"):
        files.remove_unfinished(folder, "step_*")  # training's; other commands may be writing
    return intact


PLACE = "tensor at "  # begins the words that are in a tree in place of a tensor
SHARED = "shared "  # begins the place of one of which each rank had some rows


def take_apart(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree with words in place of its tensors, and the tensors by their places.

    A tensor that is in several places is kept once.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}  # by the id of a tensor

    def word(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = keys.setdefault(
            id(value), f"{SHARED if isinstance(value, DTensor) else ''}{keystr(path)}"
        )
        tensors[key] = value
        return f"{PLACE}{key}"

    return tree_map_with_path(word, tree), tensors


def put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `take_apart` took apart."""

    def tensor(path: Any, value: Any) -> Any:
        placed = isinstance(value, str) and value.startswith(PLACE)
        return tensors[value.removeprefix(PLACE)] if placed else value

    return tree_map_with_path(tensor, tree)


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors into a folder; all ranks call this together.

    Raises an OSError, or on all ranks a CheckpointException, for example if the disk is full.
    """
    dcp.save(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())


def begin_shards(folder: Path, tensors: dict[str, Tensor]) -> Future:
    """Copies tensors, and begins to write them as `write_shards`, whose errors the result has."""
    alone = not dist.is_initialized()
    group = None if alone else writers_group()
    begun = dcp.async_save(tensors, checkpoint_id=folder, process_group=group, no_dist=alone)
    return cast(Future, begun)


def read_shards(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a folder, whole and on the CPU.

    With a mesh, of those that were sharded it reads this rank's rows; all ranks call it together.
    """
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata

    def room(key: str, found: TensorStorageMetadata) -> Tensor:
        if mesh is None or not key.startswith(SHARED):
            return torch.empty(found.size, dtype=found.properties.dtype)
        return zeros(
            *found.size, dtype=found.properties.dtype, device_mesh=mesh, placements=[Shard(0)]
        )

    tensors = {key: room(key, each) for key, each in known.items()}  # type: ignore[arg-type]
    with warnings.catch_warnings(action="ignore"):  # of a single process
        dcp.load(tensors, checkpoint_id=folder, no_dist=mesh is None)
    return tensors


FILES, RANKED = "step_*.ckpt", FOLDER / "best.json"
BEST = "best"  # in place of a step


def file_of(run: Path, step: int) -> Path:
    """The file of the checkpoint that a run keeps of a step."""
    return run / FOLDER / FILES.replace("*", f"{step:07d}")


def keep(run: Path, step: int) -> None:
    """Keeps the last checkpoint, which is of `step`, beyond the next ones; may raise OSError.

    It takes no disk space before the last one is replaced, where the file system has hard links.
    """
    path, last = file_of(run, step), run / LAST
    if path.exists() and path.samefile(last):
        return
    link = path.with_name(f".{path.name}{files.UNFINISHED}")
    link.unlink(missing_ok=True)
    try:
        os.link(last, link)
    except OSError:  # the file system has no hard links
        shutil.copyfile(last, link)
    os.replace(link, path)


def ranked(run: str | Path, metric: str | None = None) -> dict[int, float]:
    """The values by step of the metric that ranks a run's checkpoints, the best one first.

    None are left if the metric is another one than `metric`.
    """
    found = files.read_json(Path(run) / RANKED)
    if metric not in (None, found.get("metric")):
        return {}
    return {int(step): value for step, value in found.get("values", {}).items()}


def rank(run: Path, metric: str, values: dict[int, float], lasting: Callable[[int], bool]) -> None:
    """Records the best checkpoints, the best one first, and deletes those that are so no longer.

    Steps that are `lasting`, or were so when they were ranked, are kept in any case.
    """
    found = files.read_json(run / RANKED)
    known = {*map(int, found.get("values", {})), *values}
    milestones = {*filter(lasting, known), *found.get("milestones", [])}
    own = {"milestones": sorted(milestones & known)}
    files.write_json(run / RANKED, {"metric": metric, "values": values, **own})
    for step in known - values.keys() - milestones:
        file_of(run, step).unlink(missing_ok=True)


def kept(run: str | Path) -> list[int]:
    """The steps of the checkpoints that a run has, the newest one's last."""
    found = Path(run).glob(f"{FOLDER}/{FILES}")
    return sorted({*(int(each.stem.removeprefix("step_")) for each in found), step_of(run)})


def chosen(run: str | Path, step: int | str) -> tuple[int, Path] | None:
    """The step and the file of the checkpoint of `step`, or of the best one that a run keeps.

    None if it is the run's newest. Raises UserError if there is none, or if it is damaged.
    """
    folder = Path(run)
    if step == BEST:
        best = next(iter(ranked(folder)), None)
        if best is None:
            raise UserError(
                f"step=best is not known for {run}, which ranked no checkpoints; train it with "
                "callbacks.checkpoint.best=val/loss, or write the number of a step"
            )
        step = best
    if step == step_of(folder):
        return None
    path = file_of(folder, step) if isinstance(step, int) else None
    if path is None or not path.is_file():
        known = ", ".join(map(str, kept(run)))
        raise UserError(
            f"step={step} is not a checkpoint of {run}, which has those of {known}; "
            "callbacks.checkpoint.keep_every_n_steps=... keeps more in training"
        )
    if reason := fault(path):
        raise UserError(f"{path} {reason}; choose another step")
    return int(step), path
