"""The size at which one backbone costs what another does.

A cost grows with the width, so the width is bisected: at the configured depth, and if none agrees
there, at the depths around it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.build.overrides import parse
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.formats import amount
from diffusion_lab.common.progress import console, say
from diffusion_lab.profiling.costs import ALLOWED, COMPOSITION
from diffusion_lab.profiling.measured import Costs
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.folder import CONFIG
from diffusion_lab.runs.opening import inherit, require_diffusion

# keys by which a backbone is made larger, if it has them, and the steps in which they are tried
WIDTHS = {"width": 4, "channels": 4}
DEPTHS = ("depth", "blocks")
HEAD_RANGE = 1.5  # heads may become so many times wider or narrower, to fit a width
LARGEST = 2**14  # steps of a key
GAP = 16  # steps in which some width must be allowed
COSTS = ("params", "macs", "step_time")
FACTS = ("data", "image_shape", "num_classes")  # of both sides
Settings = dict[str, int]  # keys of a backbone


@dataclass(frozen=True)
class Size:
    """A size of a backbone, and what it costs there."""

    settings: Settings
    cost: float


class Sizes:
    """A backbone in all its sizes; `cost` is of a configuration, or a UserError where it cannot be.

    Raises UserError if it has no key that sets its size.
    """

    def __init__(self, cfg: DictConfig, name: str, cost: Callable[[DictConfig], float]):
        self.cfg, self.cost = cfg, cost
        own = {key: value for key, value in cfg.backbone.items() if type(value) is int}
        self.width = next((key for key in WIDTHS if key in own), None)
        self.depth = next((key for key in DEPTHS if key in own), None)
        if self.width is None and self.depth is None:
            raise UserError(
                f"backbone={name} has none of the keys {', '.join([*WIDTHS, *DEPTHS])} that could "
                "be varied; match another backbone"
            )

    def at(self, size: Settings) -> Size | None:
        """This size, with heads that fit it; None if the backbone refuses."""
        for heads in self.heads(size):
            settings = size | heads
            try:
                return Size(settings, self.cost(OmegaConf.merge(self.cfg, {"backbone": settings})))
            except UserError:
                continue
        return None

    def heads(self, size: Settings) -> list[Settings]:
        """Settings of the heads that may fit, the best first: even, and about as wide as before."""
        backbone = self.cfg.backbone
        heads, channels = backbone.get("heads"), backbone.get("head_channels")
        if self.width is None or (heads is None and channels is None):
            return [{}]
        before = channels or backbone[self.width] // heads
        # memory is read in eights: of these, fours and twos rather than odd numbers
        options = sorted(
            range(math.ceil(before / HEAD_RANGE), int(before * HEAD_RANGE) + 1),
            key=lambda option: (-math.gcd(option, 8), abs(math.log(option / before))),
        )
        if channels is not None:
            return [{"head_channels": option} for option in options]
        width = size[self.width]
        return [{"heads": width // option} for option in options if width % option == 0]

    def around(self, target: float, depth: int | None) -> list[Size]:
        """The sizes next below and above a cost at this depth, as far as there are any."""
        key = self.width or self.depth
        step = WIDTHS.get(key, 1)
        fixed = {self.depth: depth} if self.width and self.depth else {}
        at = cache(lambda steps: self.at({key: steps * step} | fixed))

        def allowed(steps: int) -> Size | None:
            """The first size from here on that the backbone allows."""
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
        """The size to take, and whether it agrees: else it is the nearest one.

        The configured depth is kept if it can be. Otherwise the ratio of width to depth is, as
        nearly as it can be.
        """

        def difference(size: Size) -> float:
            return abs(size.cost / target - 1)

        keys = [key for key in (self.width, self.depth) if key]
        configured = {key: self.cfg.backbone[key] for key in keys}
        depth = configured.get(self.depth)
        found = [Size(configured, self.cost(self.cfg)), *self.around(target, depth)]
        nearest = min(found, key=difference)
        if len(keys) == 1 or difference(nearest) <= tolerance:
            return nearest, difference(nearest) <= tolerance

        def stretch(size: Size) -> float:
            wider = size.settings[self.width] / configured[self.width]
            return abs(math.log(wider * depth / size.settings[self.depth]))

        for other in range(math.ceil(depth / 2), max(2 * depth, 4) + 1):
            found += self.around(target, other) if other != depth else []
        agreeing = [size for size in found if difference(size) <= tolerance]
        if agreeing:
            return min(agreeing, key=stretch), True
        return min(found, key=difference), False


def match(
    cfg: DictConfig,
    overrides: list[str],
    name: str,
    configure: Callable[[list[str]], DictConfig],
) -> dict[str, object]:
    """Finds the size of backbone=`name` that costs what `cfg.reference` does, and tabulates both.

    `overrides` are the command line's, and `configure` composes others. Raises UserError if no size
    agrees.
    """
    check_keys(cfg, ALLOWED)
    if cfg.by not in COSTS:
        raise UserError(f"by={cfg.by} is unknown; use one of {', '.join(COSTS)}")
    if cfg.by == "step_time" and cfg.device == "meta":
        raise UserError("by=step_time needs a device that computes; write device=auto")
    if not isinstance(cfg.tolerance, float) or not 0 < cfg.tolerance < 1:
        raise UserError(f"tolerance={cfg.tolerance} must be between 0 and 1, as in 0.02")
    parsed = (each.key_or_group.replace("/", ".") for each in parse(overrides))
    keys = dict(zip(overrides, parsed, strict=True))
    others = [override for override, key in keys.items() if key.split(".")[0] != "backbone"]
    text = str(cfg.reference)
    if Path(text, CONFIG).is_file() or ("/" in text and "=" not in text):
        saved = load_config(text)
        reference = configure(others)
        require_diffusion(text, saved)
        inherit(reference, saved, COMPOSITION, others)
        shared = tuple(group for group in COMPOSITION if group != "backbone")
        inherit(cfg, saved, shared, overrides)
        say(f"Both have the data, {', '.join(shared)} of {text}; train with the same")
    else:
        for override in text.split():
            if override.split("=")[0] in FACTS:
                raise UserError(
                    f"reference={text} chooses {override}, and both sides are counted on the same "
                    f"images; write {override} beside reference=..., not in it"
                )
        reference = configure([*others, *(text.split() if "=" in text else [f"backbone={text}"])])
    costs = Costs(cfg, reference)
    cost = getattr(costs, cfg.by)
    target = costs.seconds if cfg.by == "step_time" else cost(reference)
    size, agrees = Sizes(cfg, name, cost).solve(target, cfg.tolerance)
    difference = size.cost / target - 1
    solved = {f"backbone.{key}": value for key, value in size.settings.items()}
    kept = [o for o, key in keys.items() if key.startswith("backbone.") and key not in solved]
    paste = [f"backbone={name}", *kept, *(f"{key}={value}" for key, value in solved.items())]
    if not agrees:
        wider = math.ceil(abs(difference) * 100) / 100
        hint = f", and tolerance={wider:.2f} would take it" if wider < 1 else ""
        raise UserError(
            f"no size of backbone={name} has the {cfg.by} of {cfg.reference} to "
            f"{cfg.tolerance:.3g}; the nearest, {' '.join(paste)}, is {difference:+.1%} away{hint}"
        )
    matched = OmegaConf.merge(cfg, {"backbone": size.settings})
    figures = {"reference": costs.figures(reference), "match": costs.figures(matched)}
    if cfg.by == "step_time":
        # the search took the luckiest of many measurements
        low, ratio, high = costs.confirm(matched)
        say(f"Measured anew: {ratio:.3f} of the time ({low:.3f} to {high:.3f})")
        difference = ratio - 1
        if abs(difference) > cfg.tolerance:
            raise UserError(
                f"{' '.join(paste)} came out nearest, but measured anew it takes {ratio:.3f} of "
                f"the reference's time ({low:.3f} to {high:.3f}); time more steps with "
                f"timed_steps={4 * cfg.timed_steps}, on a machine that does nothing else"
            )
        figures["reference"]["step_time"], figures["match"]["step_time"] = target, target * ratio
    table = Table("", *figures["match"], title=f"Difference in {cfg.by}: {difference:+.2%}")
    for title, who in ((cfg.reference, "reference"), (name, "match")):
        table.add_row(title, *(amount(value) for value in figures[who].values()))
    console.print(table)
    return {"overrides": paste, "by": cfg.by, "difference": difference, **figures}
