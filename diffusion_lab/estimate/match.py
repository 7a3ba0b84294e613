"""Finds the size at which one backbone costs as much as another.

A cost grows with the width, so the width is bisected: at the configured depth, and if none agrees
there, at the depths around it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from diffusion_lab.assembly.config_keys import Means, groups
from diffusion_lab.assembly.costs import counted, image_facts
from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.assembly.sentences import MISTAKES, parse, sentence
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import inside, one_of
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.opened import inherited, load_diffusion_config

BOTH_SIDES = ("data", "image_shape", "num_classes")  # keys that a reference must not set
UNITS = ("params", "macs")
# keys that set the size of a backbone, if it has them, and the steps in which they are tried
WIDTHS = {"width": 4, "channels": 4}
DEPTHS = ("depth", "blocks")
HEAD_CHANNELS = ("head_channels", "stage.head_channels", "state_space.head_channels")
HEAD_RANGE = 1.5  # factor by which heads may become wider or narrower, to fit a width
LARGEST = 2**14  # largest value of a key, in its steps
GAP = 16  # steps within which a backbone must allow some width
Settings = dict[str, int]  # values by key of a backbone


@dataclass(frozen=True)
class Match:
    """The overrides of a backbone that costs as much as a reference, and the costs of both."""

    overrides: list[str]
    by: str
    difference: float  # relative difference in the unit `by`
    reference: dict[str, float]
    match: dict[str, float]


def match(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints the overrides that give the configured backbone the cost of `cfg.reference`."""
    with errors_at(cfg, ""):
        if is_run(text := str(cfg.reference)):
            cfg = with_costs_of(cfg, text, overrides)
        found = find_match(cfg, overrides, HydraConfig.get().runtime.choices["backbone"])
    print(" ".join(found.overrides))
    return asdict(found)


def find_match(cfg: DictConfig, overrides: list[str], name: str) -> Match:
    """Finds the size of backbone=`name` that costs as much as `cfg.reference`.

    `cfg` is a configuration of the command match, and was composed from `overrides`. The reference
    has its own backbone, and all else of `cfg`. Raises UserError if no size agrees, and ValueError
    for a wrong reference.
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


def with_costs_of(cfg: DictConfig, run: str, overrides: list[str]) -> DictConfig:
    """A copy with all settings of a run that cost something, but its backbone and `overrides`."""
    shared = ("data", *(group for group in groups(Means.COST) if group != "backbone"))
    cfg = inherited(cfg, load_diffusion_config(run), shared, overrides)
    given = {key_of(override) for override in overrides}
    if "image_shape" in given:
        given.add("data")  # the images are not the run's
    taken = ", ".join(group for group in shared if group not in given)
    say(f"Both are measured with {taken} of {run}; use the same in training")
    return cfg


def parse_reference(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """`cfg` with the backbone, and all else, of its reference: a run, overrides, or an option.

    Raises ValueError, which begins with `reference`, if it cannot be composed.
    """
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


@dataclass(frozen=True)
class Size:
    """A size of a backbone, and its cost."""

    settings: Settings
    cost: float


def resized(cfg: DictConfig, settings: Settings) -> DictConfig:
    """A copy of a configuration with these settings of its backbone."""
    cfg = cfg.copy()
    for key, value in settings.items():
        OmegaConf.update(cfg, f"backbone.{key}", value)
    return cfg


class Sizes:
    """Searches the widths and depths of a backbone; `cost(cfg)` may raise UserError.

    Raises UserError for a backbone that has no key that sets its size.
    """

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

    def at(self, size: Settings) -> Size | None:
        """Returns this size with heads that fit it, and its cost; None if the backbone refuses."""
        for heads in self.heads(size):
            settings = size | heads
            try:
                return Size(settings, self.cost(resized(self.cfg, settings)))
            except UserError:
                continue
        return None

    def heads(self, size: Settings) -> list[Settings]:
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
