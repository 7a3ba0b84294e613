"""What opening a run would execute: the classes that its configuration names."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig

from diffusion_lab.errors import UserError
from diffusion_lab.progress import say

TRUSTED = ("diffusion_lab", "torch", "lightning")  # packages


def check(cfg: DictConfig, source: Path) -> None:
    """Warns of classes of other packages in the configuration of the run `source`.

    Raises UserError for what is no class at all: functions may do anything with their arguments,
    also torch's own, and no run of ours names one.
    """
    names = sorted(set(targets(cfg)))
    for name in names:
        if name.split(".")[0] in TRUSTED and not is_class(name):
            raise UserError(
                f"{source} names {name}, which is no class of that package; open runs of this "
                "program only"
            )
    if strangers := [name for name in names if name.split(".")[0] not in TRUSTED]:
        warn(str(source.resolve()), ", ".join(strangers))


def targets(node: object) -> Iterator[str]:
    """All values of `_target_` in a configuration, at any depth."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield str(node["_target_"])
        for key in node:
            yield from targets(node[key])
    elif isinstance(node, ListConfig):
        for each in node:
            yield from targets(each)


def is_class(name: str) -> bool:
    """Whether a dotted name is that of a class that can be imported."""
    try:
        return isinstance(get_object(name), type)
    except Exception:  # of whatever the import runs into
        return False


@cache  # a command reads the same configuration more than once
def warn(source: str, names: str) -> None:
    """One line for people."""
    say(
        f"Warning: {source} names {names}, of neither {', '.join(TRUSTED[:-1])} nor {TRUSTED[-1]}. "
        "Opening a run executes what it names: go on only if you trust where it comes from."
    )
