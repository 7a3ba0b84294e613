"""Paired t-tests of compositions over the seeds that they share, corrected by Holm."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, compress

from scipy import stats

from diffusion_lab.analysis.comparison.data_sizes import by_data_size
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.significance import LEVEL, Tested, half_width, holm
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
    differences: tuple[float, ...]  # behind - ahead, a seed each, signed
    tested: Tested | None = None

    @property
    def gap(self) -> float:
        """The mean of behind - ahead over the seeds."""
        return statistics.mean(self.differences)

    @property
    def half_width(self) -> float:
        """Half the width of the gap's 95 % confidence interval, uncorrected."""
        return half_width(self.differences) if self.tested else 0.0

    @property
    def detectable(self) -> float:
        """The gap that must be exceeded, at this spread, to be told from chance; else nan."""
        return half_width(self.differences, self.tested.level) if self.tested else math.nan

    @property
    def told_apart(self) -> bool:
        """Whether the difference is one, at 5 % over all pairs."""
        return self.tested is not None and self.tested.corrected < LEVEL


def pairs_of(groups: Sequence[Group], metric: Quantity) -> list[Pair]:
    """All pairs with enough common seeds; groups of different parts of the data make none."""
    pairs, varied = [], []
    for size in by_data_size(groups):
        for a, b in combinations(size.groups, 2):
            ours, theirs = a.figures(metric.name), b.figures(metric.name)
            seeds = tuple(seed for seed in ours if seed in theirs)
            if len(seeds) < ENOUGH:
                continue
            differences = tuple(theirs[seed] - ours[seed] for seed in seeds)
            least = ROUNDING * max(max(abs(ours[seed]), abs(theirs[seed])) for seed in seeds)
            varied.append(max(differences) - min(differences) > least)
            if metric.better(statistics.mean(differences), 0):
                a, b, differences = b, a, tuple(-difference for difference in differences)
            pairs.append(Pair(size.label, a, b, seeds, differences))
    # a paired test of two samples is that of their differences
    tests = [stats.ttest_1samp(pair.differences, 0) for pair in compress(pairs, varied)]
    tested = iter(holm([float(test.pvalue) for test in tests]))
    return [
        replace(pair, tested=next(tested) if spread else None)
        for pair, spread in zip(pairs, varied, strict=True)
    ]
