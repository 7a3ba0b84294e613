"""The budget that the runs of a study share, and the settings that the budget determines."""

import math
import time
from typing import Annotated

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.families import DIFFUSION, family_of
from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.overrides import values_of
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, inside, one_of, optional, settings, whole
from diffusion_lab.profiling.match import find_match

ENDLESS = 1_000_000_000  # steps; the clock ends the run
# a folder 2024 is a number to Hydra
REFERENCE = Range("a backbone, overrides, a run", lambda v: isinstance(v, str | int | float))
# keys of doctor, profile and plan that match lacks
NOT_OF_MATCH = (
    *("speed", "depth", "combinations", "gpu", "nodes", "devices", "latents", "num_images"),
    *("mfu", "link_share", "reserve"),
)


@settings
class Budget:
    """The size of a run's network, matched to `reference`, and the length of training, in one unit.

    Sizes agree in `by` (params or macs) to the relative `tolerance`; `reference` is written as for
    `diffusion-lab match`. `images` counts training images seen; `seconds` is the time of training
    and of everything done during it. `solved` holds the resulting overrides once they are known.
    Raises ValueError for a budget that contradicts itself.
    """

    reference: Annotated[str | None, optional(REFERENCE)]
    by: Annotated[str, one_of("params", "macs")]
    tolerance: Annotated[float, inside(0, 1)]
    images: Annotated[int | None, optional(whole(1))]
    seconds: Annotated[int | None, optional(whole(1))]
    solved: list[str] | None

    def __post_init__(self) -> None:
        if self.images is not None and self.seconds is not None:
            raise ValueError("images and seconds cannot both be given; choose one")
        if self.reference is self.images is self.seconds is None:
            raise ValueError(
                "reference, images and seconds are all null, so nothing is fixed; set one of them"
            )

    def length(self, batch_size: int) -> dict[str, object]:
        """The settings that end a run, with its images rounded up to whole batches."""
        if self.images is not None:
            # a recipe may have its own time limit
            return {
                "trainer.max_steps": math.ceil(self.images / batch_size),
                "trainer.max_time": "null",
            }
        if self.seconds is not None:
            days, seconds = divmod(self.seconds, 24 * 60 * 60)
            limit = f"'{days:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds))}'"
            return {"trainer.max_steps": ENDLESS, "trainer.max_time": limit}
        return {}


def apply(cfg: DictConfig, overrides: list[str]) -> None:
    """Solves `cfg.budget`, if there is one, in place, and stores the resulting overrides there.

    `cfg` was composed from `overrides`; the reference is composed with Hydra. Raises UserError for
    a budget that contradicts itself or the command line, or that has no solution.
    """
    if not cfg.get("budget"):
        return
    budget = instantiate(cfg, "budget")
    solved = [f"{key}={value}" for key, value in budget.length(cfg.batch_size).items()]
    if budget.reference is not None and family_of(cfg) != DIFFUSION:
        raise UserError(
            f"budget.reference={budget.reference} asks for a size, which is found for diffusion "
            f"models alone; set that of family={cfg.family} by hand, with budget=images or seconds"
        )
    if budget.reference is not None:
        with errors_at(cfg, "budget"):
            solved += size_of(budget, overrides)
    given, values = values_of(overrides), values_of(solved)
    for key, value in values.items():
        if given.get(key, value) != value:
            raise UserError(
                f"{key} is set to {value} by the budget; leave it out, or write budget=none"
            )
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    cfg.budget.solved = solved
    say(f"Budget: {' '.join(solved)}")


def units(cfg: DictConfig) -> list[str]:
    """The units that a configuration's budget fixes: params or macs, and images or seconds."""
    node = cfg.get("budget")
    if not node:
        return []
    chosen = {node.by: node.reference, "images": node.images, "seconds": node.seconds}
    return [unit for unit, value in chosen.items() if value is not None]


def size_of(budget: Budget, overrides: list[str]) -> list[str]:
    """The overrides that give the composition's backbone the cost of the reference's."""
    quoted = str(budget.reference).replace("'", "\\'")
    wanted = f"reference='{quoted}'", f"by={budget.by}", f"tolerance={budget.tolerance}"
    own = [override for override in overrides if not override.startswith(NOT_OF_MATCH)]
    asked = [*own, *wanted, "device=meta"]
    composed = compose("match", overrides=asked, return_hydra_config=True)
    name = composed.hydra.runtime.choices.backbone
    found = find_match(compose("match", overrides=asked), asked, name)
    return [override for override in found.overrides if override.startswith("backbone.")]
