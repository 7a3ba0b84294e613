"""The budget that the runs of a study share, and the settings that the budget determines."""

import math
import time
from typing import Annotated

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.costs import counted, image_facts, sampling_calls
from diffusion_lab.assembly.families import DIFFUSION, family_of
from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.sentences import values_of
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, above, inside, one_of, optional, settings, whole
from diffusion_lab.estimate.match import Match, find_match
from diffusion_lab.runs.opened import load_diffusion_config

HEUN_CALLS = 2  # of a teacher that is asked in each step; twice as many if it is guided
ENDLESS = 1_000_000_000  # steps; the clock ends the run
# a folder 2024 is a number to Hydra
REFERENCE = Range("a backbone, overrides, a run", lambda v: isinstance(v, str | int | float))
# keys of doctor, profile and plan that match lacks
NOT_OF_MATCH = (
    *("speed", "depth", "combinations", "gpu", "nodes", "devices", "latents", "num_images"),
    *("mfu", "launch", "link_share", "reserve"),
)


@settings
class Budget:
    """The size of a run's network, matched to `reference`, and the length of training, in one unit.

    Sizes agree in `by` (params or macs) to the relative `tolerance`; `reference` is written as for
    `diffusion-lab match`. `images` counts training images seen; `seconds` is the time of training
    and of everything done during it; `flops` are those of the network and of its teacher's in
    training, with the reference's for each pass of a network that is matched. `solved` holds the
    resulting overrides once they are known. Raises ValueError for a budget that contradicts itself.
    """

    reference: Annotated[str | None, optional(REFERENCE)]
    by: Annotated[str, one_of("params", "macs")]
    tolerance: Annotated[float, inside(0, 1)]
    images: Annotated[int | None, optional(whole(1))]
    seconds: Annotated[int | None, optional(whole(1))]
    solved: list[str] | None
    flops: Annotated[float | None, optional(above(0))] = None  # earlier runs have none

    def __post_init__(self) -> None:
        lengths = {"images": self.images, "seconds": self.seconds, "flops": self.flops}
        given = [unit for unit, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} cannot both be given; choose one")
        if not given and self.reference is None:
            raise ValueError(
                "reference, images, seconds and flops are all null, so nothing is fixed; set one "
                "of them"
            )

    def length(self, batch_size: int, images: int | None = None) -> dict[str, object]:
        """The settings that end a run, with its images rounded up to whole batches."""
        images = self.images if images is None else images
        if images is not None:
            steps = math.ceil(images / batch_size)
            # a recipe may have its own time limit
            return {"trainer.max_steps": steps, "trainer.max_time": "null"}
        if self.seconds is not None:
            days, seconds = divmod(self.seconds, 24 * 60 * 60)
            limit = f"'{days:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds))}'"
            return {"trainer.max_steps": ENDLESS, "trainer.max_time": limit}
        return {}


def with_budget(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Solves `cfg.budget`, if there is one; returns a configuration with what it fixes.

    `cfg` was composed from `overrides`; the reference is composed with Hydra. The resulting
    overrides stand in `budget.solved`. Raises UserError for a budget that contradicts itself or the
    command line, or that has no solution.
    """
    if not cfg.get("budget"):
        return cfg
    budget = instantiate(cfg, "budget")
    if family_of(cfg) != DIFFUSION and (budget.reference is not None or budget.flops is not None):
        key = "reference" if budget.reference is not None else "flops"
        raise UserError(
            f"budget.{key} is for diffusion models alone; set the size of another model by hand, "
            "with budget=images or budget=seconds"
        )
    size, images = [], None
    with errors_at(cfg, "budget"):
        if budget.reference is not None:
            found = match_of(budget, overrides)
            size = [each for each in found.overrides if each.startswith("backbone.")]
        if budget.flops is not None:
            macs = found.reference["macs"] if budget.reference is not None else None
            images = images_for(budget.flops, cfg, macs)
    solved = [f"{key}={value}" for key, value in budget.length(cfg.batch_size, images).items()]
    solved += size
    given, values = values_of(overrides), values_of(solved)
    for key, value in values.items():
        if given.get(key, value) != value:
            raise UserError(
                f"{key} is set to {value} by the budget; leave it out, or write budget=none"
            )
    cfg = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    cfg.budget.solved = solved
    say(f"Budget: {' '.join(solved)}")
    return cfg


def units(cfg: DictConfig) -> list[str]:
    """The units that a configuration's budget fixes: params or macs, and images or seconds."""
    node = cfg.get("budget")
    if not node:
        return []
    fixed = {node.by: node.reference} | {u: node.get(u) for u in ("images", "seconds", "flops")}
    return [unit for unit, value in fixed.items() if value is not None]


def images_for(flops: float, cfg: DictConfig, macs: float | None) -> int:
    """The images to train on for so many FLOPs, with a teacher's, at `macs` of a pass if given."""
    facts = image_facts(cfg)
    cost, model = counted(cfg, facts), build_model(cfg, *facts, device="meta")
    if cost.passes is None:
        raise UserError(
            "budget.flops counts no derivatives of score matching; write budget.images=..."
        )
    macs, passes = macs or cost.macs, cost.passes
    left, teacher = flops, model.objective.teacher
    if teacher is not None and teacher.asked:
        passes += HEUN_CALLS * (1 if teacher.scale in (None, 1) else 2)
    elif teacher is not None:
        theirs = load_diffusion_config(teacher.run)
        theirs.sampler.steps = teacher.steps or theirs.sampler.steps
        left -= 2 * macs * teacher.count * (sampling_calls(theirs, facts) or 0)
    images = round(left / (2 * macs * passes))
    if images < 1:
        raise UserError(f"budget.flops={flops:.3g} are not enough for one image; give more")
    return images


def match_of(budget: Budget, overrides: list[str]) -> Match:
    """The size at which the composition's backbone has the cost of the reference's."""
    quoted = str(budget.reference).replace("'", "\\'")
    asked = [override for override in overrides if not override.startswith(NOT_OF_MATCH)]
    asked += [f"reference='{quoted}'", f"by={budget.by}", f"tolerance={budget.tolerance}"]
    asked.append("device=meta")
    composed = compose("match", overrides=asked, return_hydra_config=True)
    name = composed.hydra.runtime.choices.backbone
    return find_match(compose("match", overrides=asked), asked, name)
