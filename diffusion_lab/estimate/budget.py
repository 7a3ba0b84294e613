"""The budget that the runs of a study share: sizes of networks that cost as much, and lengths.

A cost grows with the width, so the width is bisected: at the configured depth, and if none agrees
there, at the depths around it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from diffusion_lab.assembly.config_keys import Means, groups, updated
from diffusion_lab.assembly.costs import counted, image_facts, sampling_calls
from diffusion_lab.assembly.families import DIFFUSION, family_of
from diffusion_lab.assembly.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.sentences import MISTAKES, parse, sentence, values_of
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import Range, above, inside, one_of, optional, settings, whole
from diffusion_lab.families.diffusion.teacher import heun_calls, set_as_asked
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.opened import inherited, load_diffusion_config
from diffusion_lab.training.module import ENDLESS

# a folder 2024 is a number to Hydra
REFERENCE = Range("a backbone, overrides, a run", lambda v: isinstance(v, str | int | float))
# keys of doctor, profile and plan that match lacks
NOT_OF_MATCH = (
    *("speed", "depth", "combinations", "gpu", "nodes", "devices", "latents", "num_images"),
    *("mfu", "launch", "link_share", "reserve"),
)
BOTH_SIDES = ("data", "image_shape", "num_classes")  # keys that a reference must not set
UNITS = ("params", "macs")
# keys that set the size of a backbone, if it has them, and the steps in which they are tried
WIDTHS = {"width": 4, "channels": 4}
DEPTHS = ("depth", "blocks")
HEAD_CHANNELS = ("head_channels", "stage.head_channels", "state_space.head_channels")
HEAD_RANGE = 1.5  # factor by which heads may become wider or narrower, to fit a width
LARGEST = 2**14  # largest value of a key, in its steps
GAP = 16  # steps within which a backbone must allow some width


@dataclass(frozen=True)
class Match:
    """The overrides of a backbone that costs as much as a reference, and the costs of both."""

    overrides: list[str]
    by: str
    difference: float  # relative difference in the unit `by`
    reference: dict[str, float]
    match: dict[str, float]


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
    by: Annotated[str, one_of(*UNITS)]
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
            # a recipe may have its own time limit
            return {"trainer.max_steps": math.ceil(images / batch_size), "trainer.max_time": "null"}
        if self.seconds is not None:
            days, seconds = divmod(self.seconds, 24 * 60 * 60)
            limit = f"'{days:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds))}'"
            return {"trainer.max_steps": ENDLESS, "trainer.max_time": limit}
        return {}


def with_budget(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Solves `cfg.budget`, if there is one; returns a configuration with what it fixes.

    The resulting overrides stand in `budget.solved`. Raises UserError for a budget that contradicts
    itself or the command line, or that has no solution.
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
            matched = budget.reference is not None and budget.by == "macs"
            macs = found.reference["macs"] if matched else None
            images = images_for(budget.flops, updated(cfg, values_of(size)), macs)
    solved = [f"{key}={value}" for key, value in budget.length(cfg.batch_size, images).items()]
    solved += size
    given, values = values_of(overrides), values_of(solved)
    for key, value in values.items():
        if given.get(key, value) != value:
            raise UserError(
                f"{key} is set to {value} by the budget; leave it out, or write budget=none"
            )
    cfg = updated(cfg, values)
    cfg.budget.solved = solved
    say(f"Budget: {' '.join(solved)}")
    return cfg


def units(cfg: DictConfig) -> list[str]:
    """The units that a configuration's budget fixes: params or macs, and images or seconds."""
    node = cfg.get("budget") or {}
    fixed: dict[str, object] = {str(node.get("by")): node.get("reference")}
    fixed |= {unit: node.get(unit) for unit in ("images", "seconds", "flops")}
    return [unit for unit, value in fixed.items() if value is not None]


def images_for(flops: float, cfg: DictConfig, macs: float | None) -> int:
    """The images to train on for so many FLOPs, with a teacher's, at `macs` of a pass if given."""
    if OmegaConf.select(cfg, "alignment.extractor") is not None:
        raise UserError(
            "budget.flops counts no networks of an alignment; write budget.images=... for fewer "
            "images, or alignment=none"
        )
    facts = image_facts(cfg)
    cost, model = counted(cfg, facts), build_model(cfg, *facts, device="meta")
    if cost.passes is None:
        raise UserError(
            "budget.flops counts no derivatives of score matching; write budget.images=..."
        )
    left, each = flops, 2 * (macs or cost.macs) * cost.passes
    if (teacher := model.objective.teacher) is not None:
        theirs = load_diffusion_config(teacher.run)
        set_as_asked(theirs, teacher)
        call = 2 * (macs or counted(theirs, facts).macs)
        if teacher.asked:
            each += call * heun_calls(instantiate(theirs, "guidance"))
        else:
            left -= call * teacher.count * (sampling_calls(theirs, facts) or 0)
    images = round(left / each)
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


def match(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints the overrides that give the configured backbone the cost of `cfg.reference`."""
    with errors_at(cfg, ""):
        if is_run(run := str(cfg.reference)):  # its settings that cost something are for both
            shared = ("data", *(group for group in groups(Means.COST) if group != "backbone"))
            cfg = inherited(cfg, load_diffusion_config(run), shared, overrides)
            given = {key_of(override) for override in overrides}
            if "image_shape" in given:
                given.add("data")  # the images are not the run's
            taken = ", ".join(group for group in shared if group not in given)
            say(f"Both are measured with {taken} of {run}; use the same in training")
        found = find_match(cfg, overrides, HydraConfig.get().runtime.choices["backbone"])
    print(" ".join(found.overrides))
    return asdict(found)


def find_match(cfg: DictConfig, overrides: list[str], name: str) -> Match:
    """Finds the size of backbone=`name` that costs as much as `cfg.reference`.

    The reference has its own backbone, and all else of `cfg`, a configuration of match. Raises
    UserError if no size agrees, and ValueError for a wrong reference.
    """
    check_keys(cfg, {"by": one_of(*UNITS), "tolerance": inside(0, 1)})
    reference, facts = parse_reference(cfg, overrides), image_facts(cfg)

    def costs(each: DictConfig) -> dict[str, float]:
        cost = counted(each, facts)
        return {"params": cost.parameters, "macs": cost.macs, "flops": cost.flops()}

    costs(cfg)  # fails here: a search takes any refusal for a wrong size
    try:
        theirs = costs(reference)
    except UserError as error:
        raise ValueError(f"reference={cfg.reference} cannot be built here: {error}") from error
    target, sizes = theirs[cfg.by], Sizes(cfg, name, lambda each: costs(each)[cfg.by])
    size, agrees = sizes.solve(target, cfg.tolerance)
    difference = size.cost / target - 1
    solved = {f"backbone.{key}": value for key, value in size.settings.items()}
    own = [o for o in overrides if key_of(o).startswith("backbone.") and key_of(o) not in solved]
    found = [f"backbone={name}", *own, *(f"{key}={value}" for key, value in solved.items())]
    if not agrees:
        wider = math.ceil(abs(difference) * 100) / 100
        hint = f", and tolerance={wider:.2f} would accept it" if wider < 1 else ""
        raise UserError(
            f"no size of backbone={name} has the {cfg.by} of {cfg.reference} within "
            f"{cfg.tolerance:.3g}; the nearest, {' '.join(found)}, is {difference:+.1%} away{hint}"
        )
    result = Match(found, cfg.by, difference, theirs, costs(resized(cfg, size.settings)))
    table = Table("", *theirs, title=f"Difference in {cfg.by}: {difference:+.2%}")
    for title, each in ((str(cfg.reference), theirs), (name, result.match)):
        table.add_row(title, *map(amount, each.values()))
    console.print(table)
    return result


def key_of(override: str) -> str:
    """The configuration key of an override, as in backbone.block for backbone/block=adaln."""
    (parsed,) = parse([override])
    return parsed.key_or_group.replace("/", ".")


def is_run(reference: str) -> bool:
    """Whether a reference is the path of a run."""
    return Path(reference, CONFIG).is_file() or ("/" in reference and "=" not in reference)


def parse_reference(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` as its reference, a run, overrides or an option, has it; ValueError for a wrong one."""
    text = str(cfg.reference)
    if is_run(text):
        return with_backbone(cfg.copy(), load_diffusion_config(text))
    for override in text.split():
        if override.split("=")[0] in BOTH_SIDES:
            raise ValueError(
                f"reference={text} contains {override}, but both backbones are measured on the "
                f"same images; write {override} outside of reference=..."
            )
    chosen = text.split() if "=" in text else [f"backbone={text}"]
    own = [each for each in chosen if key_of(each).startswith("backbone")]
    own += [each for each in overrides if each.startswith("hydra.searchpath=")]
    others = [each for each in overrides if not key_of(each).startswith("backbone")]
    try:
        reference = compose("match", overrides=[*others, *chosen])
        if "backbone" not in map(key_of, chosen):
            return reference
        # an experiment's or a study's values of the backbone are not for this one
        return with_backbone(reference, compose("match", overrides=own))
    except MISTAKES as error:
        raise ValueError(f"reference={text} cannot be composed: {sentence(error)}") from error


def with_backbone(cfg: DictConfig, other: DictConfig) -> DictConfig:
    """Gives `cfg`, which it changes, the backbone of another configuration."""
    OmegaConf.update(cfg, "backbone", other.backbone, merge=False)
    return cfg


class Size(NamedTuple):
    """The settings of a backbone that are its size, and its cost."""

    settings: dict[str, int]
    cost: float


def resized(cfg: DictConfig, settings: dict[str, int]) -> DictConfig:
    """A copy of a configuration with these settings of its backbone."""
    cfg = cfg.copy()
    for key, value in settings.items():
        OmegaConf.update(cfg, f"backbone.{key}", value)
    return cfg


class Sizes:
    """Searches the widths and depths of a backbone; `cost(cfg)` may raise UserError."""

    def __init__(self, cfg: DictConfig, name: str, cost: Callable[[DictConfig], float]):
        self.cfg, self.cost = cfg, cost
        own = {key: value for key, value in cfg.backbone.items() if type(value) is int}
        self.width = next((key for key in WIDTHS if key in own), None)
        self.depth = next((key for key in DEPTHS if key in own), None)
        key = self.width or self.depth
        if key is None:
            raise UserError(
                f"backbone={name} has none of the keys {', '.join([*WIDTHS, *DEPTHS])} that set a "
                "size; match another backbone"
            )
        self.key = key  # key that is searched

    def at(self, size: dict[str, int]) -> Size | None:
        """Returns this size with heads that fit it, and its cost; None if the backbone refuses."""
        for heads in self.heads(size):
            settings = size | heads
            try:
                return Size(settings, self.cost(resized(self.cfg, settings)))
            except UserError:
                continue
        return None

    def heads(self, size: dict[str, int]) -> list[dict[str, int]]:
        """Settings of the heads that may fit, the best first: even, and about as wide as before."""
        backbone = self.cfg.backbone
        heads = backbone.get("heads")
        found = ((key, OmegaConf.select(backbone, key)) for key in HEAD_CHANNELS)
        key, channels = next((pair for pair in found if pair[1] is not None), (None, None))
        if self.width is None or (heads is None and channels is None):
            return [{}]
        before = channels or backbone[self.width] // heads
        # memory is read in eights: multiples of 8 come first, then of 4 and 2, then odd numbers
        options = sorted(
            range(math.ceil(before / HEAD_RANGE), int(before * HEAD_RANGE) + 1),
            key=lambda option: (-math.gcd(option, 8), abs(math.log(option / before))),
        )
        if key is not None:
            return [{key: option} for option in options]
        width = size[self.width]
        return [{"heads": width // option} for option in options if width % option == 0]

    def around(self, target: float, depth: int | None) -> list[Size]:
        """The sizes just below and above a target cost at this depth, if they exist."""
        key, step = self.key, WIDTHS.get(self.key, 1)
        fixed = {self.depth: depth} if self.width and self.depth and depth else {}
        at = cache(lambda steps: self.at({key: steps * step} | fixed))

        def allowed(steps: int) -> Size | None:
            """The first size from `steps` on that the backbone allows."""
            return next(filter(None, map(at, range(steps, steps + GAP))), None)

        low, high = 0, max(1, self.cfg.backbone[key] // step)
        while (size := allowed(high)) and size.cost < target and high < LARGEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            size = allowed(middle)
            if size is None or size.cost < target:  # None: too small for any heads
                low = middle
            else:
                high = middle
        return [size for size in (allowed(low) if low else None, allowed(high)) if size]

    def solve(self, target: float, tolerance: float) -> tuple[Size, bool]:
        """Returns the best size, and whether it agrees; if it does not, it is the nearest one.

        The configured depth is kept if possible, or else, as nearly as possible, the ratio of width
        to depth.
        """

        def difference(size: Size) -> float:
            return abs(size.cost / target - 1)

        wide, deep = self.width, self.depth
        configured = {key: self.cfg.backbone[key] for key in (wide, deep) if key}
        depth = configured[deep] if deep else None
        found = [Size(configured, self.cost(self.cfg)), *self.around(target, depth)]
        nearest = min(found, key=difference)
        if not wide or not deep or difference(nearest) <= tolerance:
            return nearest, difference(nearest) <= tolerance

        def stretch(size: Size) -> float:
            wider = size.settings[wide] / configured[wide]
            return abs(math.log(wider * configured[deep] / size.settings[deep]))

        for other in range(math.ceil(configured[deep] / 2), max(2 * configured[deep], 4) + 1):
            found += self.around(target, other) if other != depth else []
        agreeing = [size for size in found if difference(size) <= tolerance]
        if agreeing:
            return min(agreeing, key=stretch), True
        return min(found, key=difference), False
