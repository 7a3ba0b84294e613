"""Paired t-tests of compositions over common seeds, with Holm's correction, and their wording."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from scipy import special, stats

from diffusion_lab.analysis.comparison.data_sizes import images_of, parts_of
from diffusion_lab.analysis.comparison.groups import LEVEL, Group, half_width, without_data
from diffusion_lab.build.config_keys import DATA_SIZE
from diffusion_lab.common.formats import csv_text
from diffusion_lab.metrics import Quantity

ENOUGH = 2  # the fewest common seeds for a paired test
POWER = 0.8  # the share of draws in which a detectable gap is significant
ROUNDING = 1e-9  # relative to the values: differences that vary by less count as equal


@dataclass(frozen=True)
class Tested:
    """A p-value, its corrected value, and the level that the uncorrected one had to be below."""

    p: float
    corrected: float
    level: float


@dataclass(frozen=True)
class Pair:
    """Two groups compared over their common seeds; `ahead` has the better mean.

    Differences that are the same in every seed are not tested, because a t-test judges the mean by
    the spread.
    """

    metric: Quantity
    size: str  # the label of its DataSize
    ahead: Group
    behind: Group
    seeds: tuple[int, ...]
    differences: tuple[float, ...]  # behind - ahead, one for each seed
    tested: Tested | None = None

    @property
    def gap(self) -> float:
        """The mean of behind - ahead over the seeds."""
        return statistics.mean(self.differences)

    @property
    def varied(self) -> bool:
        """Whether the differences vary by more than rounding."""
        values = (g.by_seed(self.metric.name) for g in (self.ahead, self.behind))
        largest = max(abs(each[seed]) for each in values for seed in self.seeds)
        return max(self.differences) - min(self.differences) > ROUNDING * largest

    @property
    def half_width(self) -> float:
        """Half the width of the gap's 95 % confidence interval, uncorrected."""
        return half_width(self.differences) if self.tested else 0.0

    @property
    def detectable(self) -> float:
        """The true gap that a test of such seeds finds with 80 % power; nan without a test."""
        return detectable(self.differences, self.tested.level) if self.tested else math.nan

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 5 % over all pairs."""
        return self.tested is not None and self.tested.corrected < LEVEL

    def __str__(self) -> str:
        """The result in words, without its p-value."""
        ahead, behind, metric = self.ahead.name, self.behind.name, self.metric
        size = abs(self.gap)
        if self.tested is None:
            return (
                f"{ahead} and {behind} differ in {metric.title} by "
                f"{metric.gap(size) if size else 'nothing'} in each of {len(self.seeds)} seeds; "
                "differences without spread cannot be tested, and are a sign of copied runs or of "
                "runs that do not depend on their seed"
            )
        if not self.significant:
            return (
                f"{ahead} and {behind} do not differ significantly in {metric.title}: their gap is "
                f"{metric.gap(size)}, and {len(self.seeds)} seeds with this spread have 80 % "
                f"power for a gap of {metric.gap(self.detectable)}"
            )
        interval = metric.gap(size - self.half_width, size + self.half_width)
        corrected = self.tested.corrected > self.tested.p
        return (
            f"{ahead} is better than {behind}: {metric.title} "
            f"{'higher' if metric.higher_is_better else 'lower'} by {metric.gap(size)} (95 % "
            f"confidence interval{' of this pair alone, uncorrected:' * corrected} {interval})"
        )

    def finding(self, tests: int) -> str:
        """The result in words with its p-value, as one of `tests` tested pairs."""
        said = f"At {self.size}: {self}" if self.size else str(self)
        if self.tested is None:
            return said
        seeds = ", ".join(map(str, self.seeds))
        said += f"; paired over seeds {seeds}: p = {self.tested.p:.2g}"
        holm = f", {self.tested.corrected:.2g} after Holm's correction for {tests} pairs"
        return said + holm if tests > 1 else said


@dataclass(frozen=True)
class DataSize:
    """The compositions trained on one part of the data, named without it, and their pairs.

    `images` is the number of training images as text, "6,000"; empty if there is only one part.
    Pairs with a significant difference come first, sorted by p-value.
    """

    images: str
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.images} training images" if self.images else ""

    @property
    def tested(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.tested]

    def best(self, groups: Sequence[Group]) -> Group | None:
        """The one of `groups` that is significantly better than each of the others, if any."""
        beaten = [pair.ahead.name for pair in self.pairs if pair.significant]
        others = len(groups) - 1
        return next((g for g in groups if others and beaten.count(g.name) == others), None)


def by_data_size(groups: Sequence[Group], metric: Quantity) -> list[DataSize]:
    """The groups and their tests at each size of the data, from the smallest to the largest.

    Groups of different parts of the data, or with too few common seeds, are not paired.
    """
    sizes, pairs = _sizes(groups), []
    for size in sizes:
        for a, b in combinations(size.groups, 2):
            ours, theirs = a.by_seed(metric.name), b.by_seed(metric.name)
            seeds = tuple(seed for seed in ours if seed in theirs)
            if len(seeds) < ENOUGH:
                continue
            differences = tuple(theirs[seed] - ours[seed] for seed in seeds)
            if metric.better(statistics.mean(differences), 0):
                a, b, differences = b, a, tuple(-difference for difference in differences)
            pairs.append(Pair(metric, size.label, a, b, seeds, differences))
    # a paired t-test is a one-sample test of the differences
    tests = [stats.ttest_1samp(pair.differences, 0) for pair in pairs if pair.varied]
    tested = iter(holm([float(test.pvalue) for test in tests]))
    pairs = [replace(pair, tested=next(tested)) if pair.varied else pair for pair in pairs]
    pairs.sort(key=lambda pair: (not pair.significant, pair.tested.p if pair.tested else 1.0))
    return [replace(s, pairs=tuple(pair for pair in pairs if pair.size == s.label)) for s in sizes]


def _sizes(groups: Sequence[Group]) -> list[DataSize]:
    parts = parts_of(groups)
    if len(parts) == 1:
        return [DataSize("", tuple(groups))]
    counts = [images_of(part) for part in parts]
    found = []
    for part, count in zip(parts, counts, strict=True):
        images = f"{count:,.0f}" if count else "unknown"
        if counts.count(count) > 1:
            named = zip(DATA_SIZE, part[0].data_size, strict=True)
            images += f" ({', '.join(f'{k}={v}' for k, v in named if v is not None)})"
        own = (replace(group, name=without_data(group.name)) for group in part)
        found.append(DataSize(images, tuple(own)))
    return found


def detectable(differences: Sequence[float], level: float) -> float:
    """The true mean that a t-test at `level` finds in 80 % of draws of such values.

    The test statistic has a noncentral t distribution. A true mean as large as `half_width` would
    be found in about half of the draws only.
    """
    degrees = len(differences) - 1
    threshold = stats.t.isf(level / 2, degrees)
    return float(special.nctdtrinc(degrees, 1 - POWER, threshold) * stats.sem(differences))


def holm(p_values: Sequence[float]) -> list[Tested]:
    """Applies Holm's step-down correction and returns the results in the order given.

    The lowest p-value faces the strictest level; all after the first failure face its level.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    results: dict[int, Tested] = {}
    corrected, level = 0.0, 0.0
    for rank, index in enumerate(order):
        left = len(order) - rank
        if corrected < LEVEL:
            level = LEVEL / left
        corrected = max(corrected, min(1.0, left * p_values[index]))
        results[index] = Tested(p_values[index], corrected, level)
    return [results[index] for index in range(len(p_values))]


def as_csv(pairs: Iterable[Pair]) -> str:
    """The pairs as CSV text, named by metric, without rounding; gaps are behind - ahead.

    Pairs that were not tested have no gap of 80 % power and no p-values.
    """
    head = ("metric", "data", "ahead", "behind", "seeds", "gap", "half_width", "gap_at_80_power")
    rows = []
    for pair in pairs:
        names = (pair.metric.name, pair.size, pair.ahead.name, pair.behind.name)
        seeds, tested = " ".join(map(str, pair.seeds)), pair.tested
        p = (pair.detectable, tested.p, tested.corrected) if tested else (None,) * 3
        rows.append([*names, seeds, pair.gap, pair.half_width, *p, pair.significant])
    return csv_text([*head, "p", "holm", "significant"], rows)
