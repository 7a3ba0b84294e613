"""Tests of arms over their training seeds: a frame of values in, a frame of contrasts out.

A frame of values has a row for each run, with its arm, seed and value. Different networks share
nothing but numbers with a seed, so their runs are independent: three arms or more are tested by a
model of all of them, value = arm + noise, with Tukey's correction, and two arms, or arms whose
spreads are unequal, by Welch's test with Holm's. Only runs of one network that was measured in
several ways are paired, or where a protocol asks for it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from diffusion_lab.metrics.quantity import Quantity

JOINT, WELCH, PAIRED = "joint", "welch", "paired"  # in a protocol; the first is the default
LEVEL = 0.05  # significance level of every family of tests, and of every interval
POWER = 0.8  # the share of studies in which a gap of the size that is stated is significant
ENOUGH = 2  # the fewest runs for a test
ROUNDING = 1e-9  # relative to the values: differences that vary by less count as equal
MOST_SEEDS = 1000  # above it, the number of seeds that a gap needs is not counted
Values = dict[str, dict[int, float]]  # arm -> seed -> value
COLUMNS = [  # of pairs, before correction
    *("ahead", "behind", "seeds", "gap", "error", "degrees", "relative", "relative_low"),
    *("relative_high", "better", "pairs"),
]


class Noise(NamedTuple):
    """The variance of a run around the mean of its arm, pooled over arms."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class Panel:
    """The word of one metric on the arms of the same data: means, best first, and tests.

    `data` is the number of training images as text, if there are several sizes. `floor` is what
    relative gaps are measured from, and `real` the value of real images; None without one.
    """

    metric: Quantity
    data: str
    means: pd.DataFrame
    pairs: pd.DataFrame
    floor: float | None = None
    real: float | None = None
    asked: bool = False  # whether the protocol names the pairs
    test: str = JOINT  # that was asked for

    @property
    def arms(self) -> list[str]:
        """The arms, the best mean first."""
        return [str(arm) for arm in self.means.index]

    @cached_property
    def tested(self) -> pd.DataFrame:
        return self.pairs[self.pairs.p.notna()]

    @property
    def won(self) -> pd.DataFrame:
        """The tests in which the arm with the best mean is shown to be better, nearest first."""
        known = self.tested
        found = known[(known.ahead == self.arms[0]) & known.significant]
        return found.loc[found.gap.abs().sort_values().index]

    def pair(self, one: str, other: str) -> Any | None:
        """The test of two arms; None without one."""
        known = self.tested
        found = known[known.ahead.isin([one, other]) & known.behind.isin([one, other])]
        return next(found.itertuples(), None)

    @property
    def best(self) -> str | None:
        """The arm that is shown to be better than each of the others; None without one."""
        return self.arms[0] if 0 < len(self.won) == len(self.arms) - 1 else None


def panels(
    values: pd.DataFrame,
    metric: Quantity,
    test: str = JOINT,
    asked: Sequence[tuple[str, str]] | None = None,
    real: float | None = None,
) -> list[Panel]:
    """Judges the arms by a metric at each size of the data; only arms on the same data are tested.

    A gap of a metric that is never below 0 is also relative, that of a Fréchet distance to its
    value for as many real images, because both are too high by much the same amount.
    """
    biased = real if metric.name.endswith("fid") else 0.0
    relative = not (metric.higher_is_better or metric.percent or metric.signed)
    floor = biased if relative else None
    found = []
    for data, own in values.groupby("data", sort=False):
        pairs = contrasts(own, test, asked, metric.higher_is_better, floor)
        order = means(own).sort_values("mean", ascending=not metric.higher_is_better)
        found.append(Panel(metric, str(data), order, pairs, floor, real, asked is not None, test))
    return found


def t_of(tail: float, degrees: Any) -> Any:
    """Student's t that is exceeded with probability `tail`; an array for an array of `degrees`."""
    return -special.stdtrit(degrees, tail)


def half_width(values: Sequence[float]) -> float:
    """Half the width of the confidence interval of the mean of two or more values."""
    if len(set(values)) == 1:
        return 0.0  # not the rounding of their mean
    count = len(values)
    return t_of(LEVEL / 2, count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)


def means(values: pd.DataFrame) -> pd.DataFrame:
    """The runs, mean, interval (low, high), smallest and largest value of each arm, best known."""
    found = values.groupby("arm", sort=False).value.agg(["count", "mean", "std", "min", "max"])
    half = t_of(LEVEL / 2, found["count"] - 1) * found["std"] / np.sqrt(found["count"])
    half = half.mask(found["max"] == found["min"], 0.0).where(found["count"] > 1)
    return found.assign(half=half, low=found["mean"] - half, high=found["mean"] + half)


def contrasts(
    values: pd.DataFrame,
    test: str = JOINT,
    asked: Iterable[tuple[str, str]] | None = None,
    higher_is_better: bool = False,
    floor: float | None = None,
) -> pd.DataFrame:
    """Tests the pairs of arms that are `asked` about, all by default; a row for each pair.

    `ahead` has the better mean, and `gap` is the mean of `behind` less that of `ahead`. `low` and
    `high` bound its 95 % interval; `least` and `most` bound those of all pairs at once. `corrected`
    is p after the correction over these pairs alone. `relative` is the change from `behind` to
    `ahead` above `floor`, the value of real images; nan without a floor. In `better` of `pairs`
    pairs of runs `ahead` is better. `detectable` is the true gap of 80 % power, between
    `detectable_low` and `detectable_high` as the spread is known from few runs only. A pair whose
    values do not vary is not tested: then these are nan.
    """
    groups = values.groupby("arm", sort=False)
    by_arm: Values = {arm: dict(zip(own.seed, own.value, strict=True)) for arm, own in groups}
    noise = pooled(by_arm) if test == JOINT else None
    by = WELCH if test == JOINT and noise is None else test
    rows = []
    for pair in combinations(by_arm, 2) if asked is None else asked:
        sides = {arm: by_arm.get(arm, {}) for arm in pair}
        if by == PAIRED:
            both = set.intersection(*map(set, sides.values()))
            sides = {arm: {seed: own[seed] for seed in both} for arm, own in sides.items()}
        if min(map(len, sides.values())) >= ENOUGH:
            rows.append(_row(sides, by, noise, higher_is_better, floor))
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    return pd.DataFrame({**columns, **_corrected(columns, noise), "test": by})


def beside(found: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """The tests of pairs with p_joint, p_welch and p_paired, what each says after correction.

    `against` names the tests that have the other arm ahead, as one by pairs of seeds may if they
    are not all of the runs.
    """
    pairs = [*zip(found.ahead, found.behind, strict=True)]
    lower, against = found.ahead.where(found.gap > 0, found.behind), [list[str]() for _ in pairs]
    for test in (JOINT, WELCH, PAIRED):
        own = {*found.test} == {test}
        others = found if own else contrasts(values, test, pairs)
        tested = others[others.test == test].itertuples()
        rows = {frozenset((row.ahead, row.behind)): row for row in tested}
        same = [rows.get(frozenset(pair)) for pair in pairs]
        found = found.assign(**{f"p_{test}": [getattr(row, "corrected", math.nan) for row in same]})
        for row, arm, named in zip(same, lower, against, strict=True):
            if row and not own and row.ahead != arm:
                named.append(test)
    return found.assign(against=against)


def pooled(by_arm: Values) -> Noise | None:
    """The noise of a model of all arms; None for under three arms, or if their spreads differ."""
    from scipy import stats  # late, as it takes a second

    # an arm of one run has no spread
    rows = [np.array([*own.values()]) for own in by_arm.values() if len(own) >= ENOUGH]
    if len(rows) < 3 or any(np.ptp(row) <= ROUNDING * np.abs(row).max() for row in rows):
        return None
    degrees = sum(len(row) - 1 for row in rows)
    noise = Noise(sum(row.var() * len(row) for row in rows) / degrees, degrees)
    return noise if stats.bartlett(*rows).pvalue >= LEVEL else None


def _row(
    sides: Values, test: str, noise: Noise | None, higher: bool, floor: float | None
) -> list[object]:
    """The cells of a pair in the columns of COLUMNS; `sides` are its two arms."""
    seeds = sorted(set().union(*sides.values()))
    rows = {arm: np.array([own[s] for s in seeds if s in own]) for arm, own in sides.items()}
    ahead, behind = sorted(rows, key=lambda arm: rows[arm].mean(), reverse=higher)
    ours, theirs = rows[ahead], rows[behind]
    gaps = (theirs - ours if test == PAIRED else theirs[:, None] - ours) * (-1 if higher else 1)
    better = float((gaps > 0).sum() + (gaps == 0).sum() / 2)
    change = (math.nan,) * 3
    if floor is not None and min(ours.mean(), theirs.mean()) > floor:
        # the delta method, in logarithms
        a, b = ours - floor, theirs - floor
        error, degrees = _error(a, b, test, noise, (a.mean(), b.mean()))
        t, ratio = t_of(LEVEL / 2, degrees) * error, a.mean() / b.mean()
        change = (ratio - 1, ratio * math.exp(-t) - 1, ratio * math.exp(t) - 1)
    known = (theirs.mean() - ours.mean(), *_error(ours, theirs, test, noise), *change)
    return [ahead, behind, " ".join(map(str, seeds)), *known, better, gaps.size]


def _error(
    ours: NDArray, theirs: NDArray, test: str, noise: Noise | None, by: tuple[float, float] = (1, 1)
) -> tuple[float, float]:
    """The standard error of the gap of values, each side divided by its `by`, and its degrees."""
    first, second = ours / by[0], theirs / by[1]
    rows = [second - first] if test == PAIRED else [first, second]
    largest = max(np.abs(first).max(), np.abs(second).max())
    if max(map(np.ptp, rows)) <= ROUNDING * largest:  # they do not vary
        return math.nan, math.nan
    if noise:
        scale = 1 / (len(first) * by[0] ** 2) + 1 / (len(second) * by[1] ** 2)
        return math.sqrt(noise.variance * scale), noise.degrees
    parts = [(row.var(ddof=1) / len(row), len(row) - 1) for row in rows]
    total = sum(part for part, _ in parts)
    return math.sqrt(total), float(total**2 / sum(part**2 / n for part, n in parts))


def _corrected(found: dict[str, list], noise: Noise | None) -> dict[str, Any]:
    """The columns p, its correction over all rows, intervals, and the gap of 80 % power."""
    error, degrees, gap = (np.array(found[name], float) for name in ("error", "degrees", "gap"))
    size = np.abs(gap) / error
    p = 2 * special.stdtr(degrees, -size)
    arms, tests = len({*found["ahead"], *found["behind"]}), int((~np.isnan(p)).sum())
    if noise and arms > 2 and tests == arms * (arms - 1) / 2:
        from scipy.stats import studentized_range

        tails = studentized_range.sf(math.sqrt(2) * size, arms, noise.degrees)
        correction, after = "Tukey", np.clip(tails, p, 1)
        threshold = widest(arms, noise.degrees)
    else:
        correction, after = "Holm" if tests > 1 else "", holm(p)
        threshold = t_of(LEVEL / 2 / max(1, tests), degrees)
    own, every = t_of(LEVEL / 2, degrees) * error, threshold * error
    power = special.nctdtrinc(degrees, 1 - POWER, threshold) * error
    # the true spread, by the chi-squared distribution of that of few runs
    low, high = (
        power * np.sqrt(degrees / special.chdtri(degrees, tail))
        for tail in (LEVEL / 2, 1 - LEVEL / 2)
    )
    numbers = {"p": p, "corrected": after, "correction": correction, "tests": tests}
    numbers |= {"low": gap - own, "high": gap + own, "least": gap - every, "most": gap + every}
    numbers |= {"significant": after < LEVEL, "detectable": power}
    return numbers | {"detectable_low": low, "detectable_high": high}


@cache  # it is found by integrals, in a second
def widest(arms: int, degrees: int) -> float:
    """Tukey's critical value, in standard errors of a gap."""
    from scipy.stats import studentized_range

    return float(studentized_range.isf(LEVEL, arms, degrees)) / math.sqrt(2)


def holm(p: Sequence[float] | NDArray) -> NDArray:
    """Holm's step-down correction of p-values, in the order given; nan are not tested."""
    given = np.asarray(p, float)
    found, largest = np.full(len(given), np.nan), 0.0
    order = [place for place in given.argsort() if not np.isnan(given[place])]
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * given[place]))
        found[place] = largest
    return found


def variance_split(values: pd.DataFrame) -> tuple[float, float] | None:
    """The variance over training seeds and over sampling seeds, of values with both seeds.

    They are those of a nested analysis of variance, pooled over arms. None unless runs are
    sampled several times, and some arm has several runs.
    """
    cells = values.groupby(["arm", "seed"]).value.agg(["mean", "var", "count"])
    if cells["count"].min() < 2 or cells.groupby("arm").size().max() < 2:
        return None
    weights = cells["count"] - 1
    sampling = float((cells["var"] * weights).sum() / weights.sum())
    own = cells.groupby("arm")["mean"]
    degrees = own.size() - 1
    between = float((own.var().fillna(0) * degrees).sum() / degrees.sum())
    return max(0.0, between - float((sampling / cells["count"]).mean())), sampling


def seeds_needed(std: float, gap: float) -> int | None:
    """The fewest runs of each of two arms with 80 % power for a gap; None for more than 1,000."""
    for count in range(ENOUGH, MOST_SEEDS + 1):
        degrees = 2 * (count - 1)
        found = special.nctdtrinc(degrees, 1 - POWER, t_of(LEVEL / 2, degrees))
        if found * std * math.sqrt(2 / count) <= gap:
            return count
    return None
