"""The classes that opening a run executes, and which of them are trusted."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig

from diffusion_lab.common.messages import UserError, say

PACKAGES = ("diffusion_lab", "torch", "lightning")  # packages whose classes our runs name
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
    """Warns of classes from other packages in a configuration, read from the file `source`.

    Raises UserError for a name in PACKAGES that is anything but a class of MODULES: functions may
    do anything with their arguments, other classes may start programs or empty files when they are
    built, and no run of this program names one.
    """
    names = sorted(set(targets(cfg)))
    strangers = [name for name in names if name.split(".")[0] not in PACKAGES]
    for name in names:
        if name not in strangers and not is_trusted(name):
            raise UserError(
                f"{source} names {name}, which is not a class that runs of this program use; open "
                "runs of this program only"
            )
    if strangers:
        warn(str(source.resolve()), ", ".join(strangers))


def targets(node: object) -> Iterator[str]:
    """Yields all values of `_target_` in a configuration, at any depth."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield str(node["_target_"])
        for key in node:
            yield from targets(node[key])
    elif isinstance(node, ListConfig):
        for each in node:
            yield from targets(each)


def is_trusted(name: str) -> bool:
    """Whether a dotted name is the name of a class that is defined in MODULES.

    The module that defines a class counts, not the one in the name, which may only import it.
    """
    try:
        found = get_object(name)
    except Exception:  # importing may fail in any way
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(MODULES)


@cache  # a command reads the same configuration more than once
def warn(source: str, names: str) -> None:
    """Prints a warning that the file `source` names classes of other packages."""
    say(
        f"Warning: {source} names {names}, which is part of neither {', '.join(PACKAGES[:-1])} "
        f"nor {PACKAGES[-1]}. Opening a run executes such code, so continue only if you trust the "
        "source of the run."
    )
