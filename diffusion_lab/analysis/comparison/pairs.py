"""Paired t-tests of compositions over the seeds that they share, corrected by Holm."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from diffusion_lab.analysis.comparison.data_sizes import by_data_size
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.significance import (
    LEVEL,
    Tested,
    half_width,
    holm,
    paired_p_value,
)
from diffusion_lab.metrics import Quantity

ENOUGH = 2  # common seeds of a paired test
ROUNDING = 1e-9  # of figures, relative: differences that spread by less are all one


@dataclass(frozen=True)
class Pair:
    """Two groups over the seeds that they share; `ahead` has the better mean of the two.

    Differences that are the same in every seed are not tested: they have no spread, by which a test
    would judge their mean.
    """

    size: str  # of the data, as DataSize labels it
    ahead: Group
    behind: Group
    seeds: tuple[int, ...]
    gap: float  # mean of behind - ahead over the seeds, signed
    half_width: float  # of the gap's 95 % confidence interval, uncorrected
    tested: Tested | None
    detectable: float  # what a gap of this spread must exceed to be told from chance; else nan

    @property
    def told_apart(self) -> bool:
        """Whether the difference is one, at 5 % over all pairs."""
        return self.tested is not None and self.tested.corrected < LEVEL


def pairs_of(groups: Sequence[Group], metric: Quantity) -> list[Pair]:
    """All pairs with enough common seeds; groups of different parts of the data make none."""
    found = []
    for size in by_data_size(groups):
        for a, b in combinations(size.groups, 2):
            seeds = common_seeds(a, b, metric.name)
            if len(seeds) < ENOUGH:
                continue
            ours, theirs = ([_value(group, seed, metric) for seed in seeds] for group in (a, b))
            differences = [y - x for x, y in zip(ours, theirs, strict=True)]
            least = ROUNDING * max(map(abs, (*ours, *theirs)))
            spread = max(differences) - min(differences) > least
            if metric.better(statistics.mean(differences), 0):
                a, b, differences = b, a, [-difference for difference in differences]
            found.append((size.label, a, b, seeds, differences, spread))
    tests = iter(holm([paired_p_value(differences) for *_, differences, spread in found if spread]))
    pairs = []
    for label, ahead, behind, seeds, differences, spread in found:
        tested = next(tests) if spread else None
        width = half_width(differences) if spread else 0.0
        detectable = half_width(differences, tested.level) if tested else math.nan
        gap = statistics.mean(differences)
        pairs.append(Pair(label, ahead, behind, seeds, gap, width, tested, detectable))
    return pairs


def common_seeds(a: Group, b: Group, kind: str) -> tuple[int, ...]:
    """Of which both have a finite figure."""
    return tuple(
        seed
        for seed, member in a.by_seed.items()
        if kind in member.figures and seed in b.by_seed and kind in b.by_seed[seed].figures
    )


def _value(group: Group, seed: int, metric: Quantity) -> float:
    return group.by_seed[seed].figures[metric.name]
