"""The classes that opening a run executes, and which of them are trusted."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig

from diffusion_lab.assembly.families import TRAINED
from diffusion_lab.common.messages import UserError, say

PACKAGES = ("diffusion_lab", "torch", "lightning")  # packages whose classes our runs name
FAMILIES = "diffusion_lab.families."
# The places of the classes that each key may hold, with all keys below it; the longest key counts.
# A class of another place may start a program or empty a file when it is built.
PLACES = {
    "alignment": ("diffusion_lab.training.alignment.",),
    "alignment.extractor": ("diffusion_lab.metrics.extractor.",),
    "augmentation": ("diffusion_lab.data.augmentation.",),
    "autoencoder": ("diffusion_lab.first_stage.autoencoder.",),
    "backbone": ("diffusion_lab.backbone.", FAMILIES, "torch.nn."),
    "budget": ("diffusion_lab.estimate.budget.",),
    "callbacks": ("diffusion_lab.training.callbacks.", "lightning.pytorch.callbacks."),
    "conditioning": ("diffusion_lab.backbone.conditioning.",),
    "coupling": ("diffusion_lab.data.coupling.",),
    "data": ("diffusion_lab.data.",),
    "first_stage": ("diffusion_lab.first_stage.",),
    "guidance": ("diffusion_lab.diffusion.guidance.", FAMILIES),
    "logger": ("diffusion_lab.training.logger.",),
    "lr_schedule": ("diffusion_lab.training.lr_schedule.",),
    "metrics": ("diffusion_lab.metrics.",),
    "metrics.extra": ("diffusion_lab.metrics.", "torchmetrics."),
    "objective": ("diffusion_lab.diffusion.objective.", FAMILIES),
    "objective.discriminator": ("diffusion_lab.backbone.discriminator.",),
    "optimizer": ("diffusion_lab.training.optimizer.", "torch.optim."),
    "reconstruction": ("diffusion_lab.first_stage.reconstruction.",),
    "sampler": ("diffusion_lab.diffusion.sampler.", FAMILIES),
    "schedule": ("diffusion_lab.diffusion.schedule.",),
    "trainer": ("lightning.Trainer", "lightning.pytorch.trainer."),
    "trainer.strategy": ("diffusion_lab.compute.sharding.", "lightning.pytorch.strategies."),
}


def check(cfg: DictConfig, source: Path) -> None:
    """Warns of classes from other packages in a configuration, read from the file `source`.

    Raises UserError for a name in PACKAGES that is anything but a class which its key may hold.
    """
    strangers = set()
    for key, name in targets(cfg):
        if is_trusted(key, name):
            continue
        if name.split(".")[0] in PACKAGES:
            raise UserError(
                f"{source} names {name} at {key}, which is not a class that runs of this program "
                "use there; open runs of this program only"
            )
        strangers.add(name)
    if strangers:
        warn(str(source.resolve()), ", ".join(sorted(strangers)))


def targets(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the key and the class of each `_target_`, at any depth, and of a user's family."""
    if isinstance(node, DictConfig):
        if not key and node.get("family") not in (None, *TRAINED):
            yield "family", f"{node.family}.RUN"
        if "_target_" in node:
            yield key, str(node["_target_"])
        for name in node:
            yield from targets(node[name], f"{key}.{name!s}".lstrip("."))
    elif isinstance(node, ListConfig):
        for each in node:
            yield from targets(each, key)


def is_trusted(key: str, name: str) -> bool:
    """Whether a dotted name is that of a class which a key may hold, by the place it is defined in.

    Nothing is imported for a name of another place. The module that defines a class counts, too:
    the one in the name may only import it.
    """
    rows = [row for row in PLACES if f"{key}.".startswith(f"{row}.")]
    places = PLACES[max(rows, key=len)] if rows else ()
    if not name.startswith(places):
        return False
    try:
        found = get_object(name)
    except Exception:  # importing may fail in any way
        return key == "objective.loss"  # a loss that is gone is known by its facts
    return isinstance(found, type) and f"{found.__module__}.".startswith(places)


@cache  # a command reads the same configuration more than once
def warn(source: str, names: str) -> None:
    """Prints a warning that the file `source` names classes of other packages."""
    say(
        f"Warning: {source} names {names}, which is part of neither {', '.join(PACKAGES[:-1])} "
        f"nor {PACKAGES[-1]}. Opening a run executes such code, so continue only if you trust the "
        "source of the run."
    )
