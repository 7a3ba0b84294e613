"""The checkpoints that a run keeps of single steps: milestones, and the best by a metric.

They are checkpoints/step_*.ckpt. checkpoints/best.json has the metric and its values by step.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusion_lab.common.files import UNFINISHED, read_json, write_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.checkpoints import FOLDER, LAST

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
    link = path.with_name(f".{path.name}{UNFINISHED}")
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
    found = read_json(Path(run) / RANKED)
    if metric not in (None, found.get("metric")):
        return {}
    return {int(step): value for step, value in found.get("values", {}).items()}


def rank(run: Path, metric: str, values: dict[int, float], lasting: Callable[[int], bool]) -> None:
    """Records the best checkpoints, the best one first, and deletes those that are so no longer.

    Steps that are `lasting` are kept in any case.
    """
    before = ranked(run)
    write_json(run / RANKED, {"metric": metric, "values": values})
    for step in before.keys() - values.keys():
        if not lasting(step):
            file_of(run, step).unlink(missing_ok=True)


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
    newest = checkpoints.step_of(folder)
    if step == newest:
        return None
    path = file_of(folder, step) if isinstance(step, int) else None
    if path is None or not path.is_file():
        steps = [int(each.stem.removeprefix("step_")) for each in folder.glob(f"{FOLDER}/{FILES}")]
        known = ", ".join(map(str, sorted({*steps, newest})))
        raise UserError(
            f"step={step} is not a checkpoint of {run}, which has those of {known}; "
            "callbacks.checkpoint.keep_every_n_steps=... keeps more in training"
        )
    if reason := checkpoints.fault(path):
        raise UserError(f"{path} {reason}; choose another step")
    return int(step), path
