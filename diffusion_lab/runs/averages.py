"""The averages of a run's weights, by name: kept in its checkpoint, or made by `average`.

An average that was made is in averages/<length>_step<step>/ in the run folder.
"""

from collections.abc import Iterable
from pathlib import Path

from diffusion_lab.common.messages import UserError

FOLDER = Path("averages")  # inside the run folder
NO_AVERAGE = "trained"  # in place of an average's name: the weights as the optimiser left them


def name_of(average: object) -> str:
    """The name of an average: its length or half-life as a number without zeros, or text as is."""
    return f"{average:.15g}" if isinstance(average, int | float) else str(average)


def folder_of(run: str | Path, length: float, step: int) -> Path:
    """The folder of an average that is made of a run's weights up to a step."""
    return Path(run) / FOLDER / f"{name_of(length)}_step{step}"


def run_of(folder: Path) -> Path:
    """The run of whose weights the average in a folder was made; the folder itself if none is."""
    made = folder.parent.name == FOLDER.name and "_step" in folder.name
    return folder.parents[1] if made else folder


def length_and_step(average: str) -> tuple[str, str]:
    """The length in the name of an average, and the step if it names one, else ""."""
    length, _, step = average.partition("_step")
    return length, step


def step_of(folder: Path) -> int:
    """The step of an average that was made, from the name of its folder."""
    return int(length_and_step(folder.name)[1])


def find(run: str | Path, average: str, step: int, kept: Iterable[str] = ()) -> Path:
    """The folder of an average that was made of a run: <length>, at `step`, or <length>_step<step>.

    Raises UserError if there is none, which names those that there are, and those that are `kept`.
    """
    folder = Path(run) / FOLDER
    for path in (folder / f"{average}_step{step}", folder / average):
        if path.is_dir() and "_step" in path.name:
            return path
    made = [path.name.removesuffix(f"_step{step}") for path in sorted(folder.glob("*_step*"))]
    known = [*kept, *made]
    choice = f"write one of {', '.join(known)}, or " if known else ""
    length, at = length_and_step(average)
    raise UserError(
        f"average={average} is not an average of {run}; {choice}make one by "
        f"`diffusion-lab average run={run} length={length if at else '...'} step={at or step}`"
    )
