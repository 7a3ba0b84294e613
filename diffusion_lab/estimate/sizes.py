"""The sizes of a backbone, searched for one that costs a given amount.

A cost grows with the width, so the width is bisected: at the configured depth, and if none agrees
there, at the depths around it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.common.messages import UserError

# keys that set the size of a backbone, if it has them, and the steps in which they are tried
WIDTHS = {"width": 4, "channels": 4}
DEPTHS = ("depth", "blocks")
HEAD_CHANNELS = ("head_channels", "stage.head_channels", "state_space.head_channels")
HEAD_RANGE = 1.5  # factor by which heads may become wider or narrower, to fit a width
LARGEST = 2**14  # largest value of a key, in its steps
GAP = 16  # steps within which a backbone must allow some width
Settings = dict[str, int]  # values by key of a backbone


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
