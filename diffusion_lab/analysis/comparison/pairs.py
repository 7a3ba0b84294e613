"""Tests of pairs of compositions over their seeds, with Holm's correction, and their wording."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from scipy import stats

from diffusion_lab.analysis.comparison.data_sizes import images_of, parts_of
from diffusion_lab.analysis.comparison.groups import LEVEL, Group
from diffusion_lab.analysis.comparison.names import without_data
from diffusion_lab.analysis.comparison.significance import Tested, detectable, holm
from diffusion_lab.build.config_keys import DATA_SIZE
from diffusion_lab.common.formats import csv_text
from diffusion_lab.metrics import Quantity
from diffusion_lab.training.protocol import PAIRED

ENOUGH = 2  # the fewest seeds for a test
ROUNDING = 1e-9  # relative to the values: differences that vary by less count as equal


@dataclass(frozen=True)
class Pair:
    """Two groups compared by a t-test; `ahead` has the better mean.

    The test is paired over common seeds, or Welch's. Values that do not vary are not tested,
    because a t-test judges the mean by the spread.
    """

    metric: Quantity
    size: str  # the label of its DataSize
    ahead: Group
    behind: Group
    seeds: tuple[int, ...]  # the common seeds of a paired test, all seeds of Welch's
    test: str = PAIRED
    tested: Tested | None = None

    @property
    def values(self) -> tuple[list[float], list[float]]:
        """The values of both groups, in the order of the seeds."""
        both = (group.by_seed(self.metric.name) for group in (self.ahead, self.behind))
        ours, theirs = ([each[seed] for seed in self.seeds if seed in each] for each in both)
        return ours, theirs

    @property
    def differences(self) -> list[float]:
        """The values of `behind` minus those of `ahead`, one for each seed of a paired test."""
        ours, theirs = self.values
        return [b - a for a, b in zip(ours, theirs, strict=True)]

    @property
    def gap(self) -> float:
        """The mean of `behind` minus that of `ahead`."""
        ours, theirs = self.values
        return statistics.mean(theirs) - statistics.mean(ours)

    @property
    def constant(self) -> bool:
        """Whether all values of both groups are equal, as shares of 0 are."""
        ours, theirs = self.values
        return len({*ours, *theirs}) == 1

    @property
    def varied(self) -> bool:
        """Whether values, or their differences, vary by more than rounding."""
        ours, theirs = self.values
        largest = max(map(abs, (*ours, *theirs)))
        rows = [self.differences] if self.test == PAIRED else [ours, theirs]
        return max(max(row) - min(row) for row in rows) > ROUNDING * largest

    @property
    def error_and_degrees(self) -> tuple[float, float]:
        """The standard error of the gap and its degrees of freedom, after Welch-Satterthwaite."""
        if self.test == PAIRED:
            return float(stats.sem(self.differences)), len(self.differences) - 1
        parts = [(statistics.variance(row) / len(row), len(row)) for row in self.values]
        total = sum(part for part, _ in parts)
        return math.sqrt(total), total**2 / sum(part**2 / (n - 1) for part, n in parts)

    @property
    def p(self) -> float:
        """The p-value of the t-test, of two sides and without correction."""
        error, degrees = self.error_and_degrees
        return float(2 * stats.t.sf(abs(self.gap) / error, degrees))

    @property
    def half_width(self) -> float:
        """Half the width of the gap's 95 % confidence interval, uncorrected."""
        if not self.tested:
            return 0.0
        error, degrees = self.error_and_degrees
        return float(stats.t.isf(LEVEL / 2, degrees) * error)

    @property
    def detectable(self) -> float:
        """The true gap that a test of such seeds finds with 80 % power; nan without a test."""
        if not self.tested:
            return math.nan
        return detectable(*self.error_and_degrees, self.tested.level)

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 5 % over all tests of its family."""
        return self.tested is not None and self.tested.corrected < LEVEL

    def __str__(self) -> str:
        """The result in words, without its p-value."""
        ahead, behind, metric = self.ahead.name, self.behind.name, self.metric
        size = abs(self.gap)
        if self.tested is None and not size and self.constant:
            value = metric.number(self.values[0][0])
            return (
                f"{ahead} and {behind} are equal in {metric.title}, {value}, in each of "
                f"{len(self.seeds)} seeds, which is not tested"
            )
        if self.tested is None:
            gap = f"by {metric.gap(size)}" if size else "by nothing"
            return (
                f"{ahead} and {behind} differ in {metric.title} {gap} in each of "
                f"{len(self.seeds)} seeds, which is not tested: are these copies, or blind to "
                "the seed?"
            )
        if not self.significant:
            return (
                f"{ahead} and {behind} do not differ significantly in {metric.title}: gap "
                f"{metric.gap(size)}, of 80 % power for {metric.gap(self.detectable)}"
            )
        interval = metric.gap(size - self.half_width, size + self.half_width)
        better = "higher" if metric.higher_is_better else "lower"
        alone = ", uncorrected" if self.tested.corrected > self.tested.p else ""
        return (
            f"{ahead} is better than {behind}: {metric.title} {better} by {metric.gap(size)} "
            f"(95 % interval {interval}{alone})"
        )

    def finding(self) -> str:
        """The result in words with its p-value."""
        said = f"At {self.size}: {self}" if self.size else str(self)
        if self.tested is None:
            return said
        said += f"; {len(self.seeds)} seeds, p = {self.tested.p:.2g}"
        return said + f", Holm {self.tested.corrected:.2g}" if self.tested.tests > 1 else said


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


def by_data_size(groups: Sequence[Group], metric: Quantity, test: str = PAIRED) -> list[DataSize]:
    """The groups and their pairs at each size of the data, from the smallest to the largest.

    Groups of different parts of the data, or with too few seeds, are not paired. Nothing is tested
    yet: `tested` does that, for all pairs that are looked at.
    """
    sizes = []
    for size in _sizes(groups):
        pairs = []
        for a, b in combinations(size.groups, 2):
            ours, theirs = a.by_seed(metric.name), b.by_seed(metric.name)
            common = [seed for seed in ours if seed in theirs]
            seeds = common if test == PAIRED else sorted({*ours, *theirs})
            if min(len(ours), len(theirs), len(seeds)) < ENOUGH:
                continue
            pair = Pair(metric, size.label, a, b, tuple(seeds), test)
            swapped = metric.better(pair.gap, 0)
            pairs.append(replace(pair, ahead=b, behind=a) if swapped else pair)
        sizes.append(replace(size, pairs=tuple(pairs)))
    return sizes


def tested(sizes: Sequence[DataSize], family: Sequence[DataSize]) -> list[DataSize]:
    """The pairs of `sizes`, tested with Holm's correction over all pairs of `family`.

    `family` contains `sizes`. Significant pairs come first, sorted by p-value.
    """
    looked_at = [pair for size in family for pair in size.pairs if pair.varied]
    results = dict(zip(map(id, looked_at), holm([pair.p for pair in looked_at]), strict=True))
    found = []
    for size in sizes:
        pairs = [replace(pair, tested=results.get(id(pair))) for pair in size.pairs]
        pairs.sort(key=lambda pair: (not pair.significant, pair.tested.p if pair.tested else 1.0))
        found.append(replace(size, pairs=tuple(pairs)))
    return found


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


def as_csv(pairs: Iterable[Pair]) -> str:
    """The pairs as CSV text, named by metric, without rounding; gaps are behind - ahead.

    Pairs that were not tested have no gap of 80 % power and no p-values.
    """
    head = ("metric", "data", "test", "ahead", "behind", "seeds", "gap", "half_width")
    rows = []
    for pair in pairs:
        names = (pair.metric.name, pair.size, pair.test, pair.ahead.name, pair.behind.name)
        seeds, tested = " ".join(map(str, pair.seeds)), pair.tested
        p = (pair.detectable, tested.p, tested.corrected, tested.tests) if tested else (None,) * 4
        rows.append([*names, seeds, pair.gap, pair.half_width, *p, pair.significant])
    return csv_text([*head, "gap_at_80_power", "p", "holm", "tests", "significant"], rows)
