"""The classes that opening a run executes, and which of them are trusted."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig

from diffusion_lab.common.messages import UserError, say

PACKAGES = ("diffusion_lab", "torch", "lightning")  # whose classes a run of this program names
# the modules of those packages whose classes configurations use
MODULES = (
    "diffusion_lab.",
    "torch.nn.",
    "torch.optim.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.trainer.",
)


def check(cfg: DictConfig, source: Path) -> None:
    """Warns of classes of other packages in the configuration of the run `source`.

    Raises UserError for a name within PACKAGES that leads to anything but a class of MODULES:
    functions may do anything with their arguments, other classes may start programs or empty files
    as they are made, and no run of ours names one.
    """
    names = sorted(set(targets(cfg)))
    strangers = [name for name in names if name.split(".")[0] not in PACKAGES]
    for name in names:
        if name not in strangers and not is_trusted(name):
            raise UserError(
                f"{source} names {name}, which is no class that runs of this program are made of; "
                "open runs of this program only"
            )
    if strangers:
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


def is_trusted(name: str) -> bool:
    """Whether a dotted name is that of a class which MODULES define.

    Where it is defined counts, and not by what way it is reached: modules hold what they import.
    """
    try:
        found = get_object(name)
    except Exception:  # importing may fail in any way
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(MODULES)


@cache  # a command reads the same configuration more than once
def warn(source: str, names: str) -> None:
    """One line for people."""
    say(
        f"Warning: {source} names {names}, of neither {', '.join(PACKAGES[:-1])} nor "
        f"{PACKAGES[-1]}. Opening a run executes what it names: go on only if you trust where it "
        "comes from."
    )
