"""What the runs of a study have in equal measure, and the settings that follow from it."""

import math
from dataclasses import dataclass

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.build.overrides import values_of
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.progress import say
from diffusion_lab.profiling.match import match

COUNTED = ("params", "macs")
ENDLESS = 1_000_000_000  # steps; the clock ends the run
NOT_OF_MATCH = ("speed", "depth", "combinations")  # keys of doctor and profile


@dataclass(frozen=True)
class Budget:
    """Size and length of a run: a network's by that of `reference`, training's in one unit.

    `by` is params or macs, of a `reference` as `diffusion-lab match` takes it, to the relative
    `tolerance`. `images` are training images seen; `seconds` are of training with all
    that is done on the way. `solved` are the overrides that came of it, once they are known. Raises
    ValueError for what contradicts itself.
    """

    reference: str | None
    by: str
    tolerance: float
    images: int | None
    seconds: int | None
    solved: list[str] | None

    def __post_init__(self) -> None:
        if self.by not in COUNTED:
            raise ValueError(f"budget.by={self.by} is unknown; use {' or '.join(COUNTED)}")
        if self.images is not None and self.seconds is not None:
            raise ValueError("budget.images and budget.seconds cannot both be given; choose one")
        if self.reference is self.images is self.seconds is None:
            raise ValueError(
                "the budget fixes nothing; give budget.reference, budget.images or budget.seconds"
            )
        for unit in ("images", "seconds"):
            value = getattr(self, unit)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"budget.{unit}={value} must be a whole number of at least 1")

    def length(self, batch_size: int) -> dict[str, object]:
        """The settings that end a run, its images rounded up to whole batches."""
        if self.images is not None:
            # a recipe may have a time limit of its own
            return {
                "trainer.max_steps": math.ceil(self.images / batch_size),
                "trainer.max_time": "null",
            }
        if self.seconds is not None:
            minutes, seconds = divmod(self.seconds, 60)
            hours, minutes = divmod(minutes, 60)
            days, hours = divmod(hours, 24)
            limit = f"'{days:02}:{hours:02}:{minutes:02}:{seconds:02}'"
            return {"trainer.max_steps": ENDLESS, "trainer.max_time": limit}
        return {}


def apply(cfg: DictConfig, overrides: list[str]) -> None:
    """Solves `cfg.budget`, if there is one, in place; the overrides that come of it are kept there.

    `overrides` are those that `cfg` was composed from. Needs Hydra, to compose the reference.
    Raises UserError for a budget that contradicts itself, the command line, or has no solution.
    """
    if not cfg.get("budget"):
        return
    budget = instantiate(cfg, "budget")
    solved = [f"{key}={value}" for key, value in budget.length(cfg.batch_size).items()]
    if budget.reference is not None:
        solved += size_of(budget, [o for o in overrides if not o.startswith(NOT_OF_MATCH)])
    given = values_of(overrides)
    for key, value in values_of(solved).items():
        if given.get(key, value) != value:
            raise UserError(
                f"{key} follows from the budget, which makes it {value}; leave it out, or write "
                "budget=none"
            )
    put(cfg, solved)
    cfg.budget.solved = solved
    say(f"Budget: {' '.join(solved)}")


def units(cfg: DictConfig) -> list[str]:
    """What the runs of a configuration's budget have in common: params or macs, images, seconds."""
    node = cfg.get("budget")
    if not node:
        return []
    chosen = {node.by: node.reference, "images": node.images, "seconds": node.seconds}
    return [unit for unit, value in chosen.items() if value is not None]


def size_of(budget: Budget, overrides: list[str]) -> list[str]:
    """The overrides that give the composition's backbone the cost of the reference's."""
    reference = budget.reference.replace("'", "\\'")
    asked = [*overrides, f"reference='{reference}'", f"by={budget.by}", "device=meta"]
    asked.append(f"tolerance={budget.tolerance}")
    composed = compose("match", overrides=asked, return_hydra_config=True)
    name = composed.hydra.runtime.choices.backbone
    configure = lambda chosen: compose("match", overrides=chosen)  # noqa: E731
    result = match(configure(asked), asked, name, configure)
    return [override for override in result["overrides"] if override.startswith("backbone.")]


def put(cfg: DictConfig, solved: list[str]) -> None:
    """Writes solved overrides into a configuration."""
    for key, value in values_of(solved).items():
        OmegaConf.update(cfg, key, value)
