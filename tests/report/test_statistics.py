"""Tests of arms against R's published values and scipy, and simulations of what they promise."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from helpers.pairs import first_fast
from scipy import stats

from diffusion_lab.metrics.quantity import LOWER, Quantity
from diffusion_lab.report import tests
from diffusion_lab.report.tests import JOINT, PAIRED, WELCH, beside, contrasts, half_width, holm

# Student's t, two-sided 95 %, by degrees of freedom, from a printed table
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}
PLANTS = {  # R's PlantGrowth
    "ctrl": [4.17, 5.58, 5.18, 6.11, 4.50, 4.61, 5.17, 4.53, 5.33, 5.14],
    "trt1": [4.81, 4.17, 4.41, 3.59, 5.87, 3.83, 6.03, 4.89, 4.32, 4.69],
    "trt2": [6.31, 5.12, 5.54, 5.50, 5.37, 5.29, 4.92, 6.15, 5.80, 5.26],
}
SLEEP = {  # R's sleep
    "one": [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    "two": [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
}
DYESTUFF = [  # lme4's Dyestuff: five samples of each of six batches
    [1545, 1440, 1440, 1520, 1580],
    [1540, 1555, 1490, 1560, 1495],
    [1595, 1550, 1605, 1510, 1560],
    [1445, 1440, 1595, 1465, 1545],
    [1595, 1630, 1515, 1635, 1625],
    [1520, 1455, 1450, 1480, 1445],
]


def frame(arms: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(a, seed, v) for a, own in arms.items() for seed, v in enumerate(own)]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])


def by_pair(found: pd.DataFrame) -> dict:
    return {frozenset((row.ahead, row.behind)): row for row in found.itertuples()}


@pytest.mark.parametrize(
    ("name", "floor"), [("fid", 96.3), ("classifier_fid", 96.3), ("confidence_error", 0.0)]
)
def test_the_real_value_is_taken_from_frechet_distances_alone(name, floor):
    values = frame({"a": [100.0, 101.0], "b": [120.0, 122.0]}).assign(data="")
    (panel,) = tests.panels(values, Quantity(name, name, "", LOWER), real=96.3)
    assert panel.floor == floor


def test_three_arms_and_more_are_tested_by_tukeys_test():
    """The values are those of TukeyHSD(aov(weight ~ group, PlantGrowth))."""
    found = contrasts(frame(PLANTS), higher_is_better=True)
    assert set(found.test) == {JOINT}
    assert set(found.correction) == {"Tukey"}
    published = {
        ("ctrl", "trt1"): (0.371, 0.3908711, 1.0622161),
        ("trt2", "ctrl"): (0.494, 0.1979960, 1.1852161),
        ("trt2", "trt1"): (0.865, 0.0120064, 1.5562161),
    }
    for pair in found.itertuples():
        gap, p, end = published[pair.ahead, pair.behind]
        assert -pair.gap == pytest.approx(gap)
        assert pair.corrected == pytest.approx(p, abs=1e-6)
        assert -pair.least == pytest.approx(end, abs=1e-5)
    theirs = stats.tukey_hsd(*PLANTS.values())
    assert sorted(found.corrected) == pytest.approx(sorted(theirs.pvalue[np.triu_indices(3, 1)]))


def test_two_arms_are_tested_by_welchs_test():
    """The values are those of t.test(extra ~ group, sleep)."""
    (pair,) = contrasts(frame(SLEEP), higher_is_better=True).itertuples()
    assert (pair.test, pair.correction, pair.ahead) == (WELCH, "", "two")
    assert pair.degrees == pytest.approx(17.776, abs=1e-3)
    assert pair.p == pair.corrected == pytest.approx(0.07939, abs=1e-5)
    assert (pair.low, pair.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)


def test_runs_of_one_network_are_paired_where_that_is_asked_for():
    (pair,) = contrasts(frame(SLEEP), PAIRED, higher_is_better=True).itertuples()
    assert pair.p == pytest.approx(0.002833, abs=1e-6)  # t.test(..., paired = TRUE)
    assert (pair.better, pair.pairs) == (9.5, 10)  # one subject slept as long
    shifted = frame(SLEEP)
    shifted.loc[shifted.arm == "two", "seed"] += 5
    (pair,) = contrasts(shifted, PAIRED).itertuples()
    assert pair.seeds == "5 6 7 8 9"


def test_holms_correction_is_rs():
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, np.nan, 0.01]) == pytest.approx([0.04, np.nan, 0.02], nan_ok=True)
    assert list(holm([])) == []


def test_the_correction_covers_the_pairs_that_are_asked_about_alone():
    asked = [("ctrl", "trt1"), ("ctrl", "trt2")]
    found = contrasts(frame(PLANTS), JOINT, asked)
    assert [{row.ahead, row.behind} for row in found.itertuples()] == [{*pair} for pair in asked]
    assert set(found.correction) == {"Holm"}
    assert list(found.corrected) == pytest.approx(holm(found.p))
    assert set(found.tests) == {2}
    # the noise is still that of all arms: R's residual standard error is 0.6234
    assert list(found.error * math.sqrt(5)) == pytest.approx([0.6234] * 2, abs=1e-4)


def test_arms_of_unequal_spread_are_tested_pair_by_pair():
    arms = {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9], "c": [50.0, 140.0, 90.0]}
    found = beside(contrasts(frame(arms)), frame(arms))
    assert set(found.test) == {WELCH}
    assert found.p_joint.isna().all()
    for (a, b), p in zip(combinations(arms, 2), found.p, strict=True):
        assert p == pytest.approx(stats.ttest_ind(arms[a], arms[b], equal_var=False).pvalue)


def test_what_other_tests_say_stands_beside_each_pair():
    found = beside(contrasts(frame(PLANTS), PAIRED), frame(PLANTS))
    pairs = [*combinations(PLANTS.values(), 2)]
    assert list(found.corrected) == pytest.approx(list(found.p_paired))
    welch = holm([stats.ttest_ind(a, b, equal_var=False).pvalue for a, b in pairs])
    assert list(found.p_welch) == pytest.approx(welch)
    assert sorted(found.p_joint) == pytest.approx([0.0120064, 0.1979960, 0.3908711], abs=1e-6)


def test_values_that_do_not_vary_are_not_tested():
    found = contrasts(frame({"a": [0.3, 0.3], "b": [0.4, 0.4], "c": [1.0, 2.0]}), WELCH)
    known = by_pair(found)
    assert math.isnan(known[frozenset("ab")].p)
    assert not known[frozenset("ab")].significant
    assert set(found[found.p.notna()].tests) == {2}
    (pair,) = contrasts(frame({"a": [100.3, 200.7], "b": [100.4, 200.8]}), PAIRED).itertuples()
    assert math.isnan(pair.p)  # differences are equal up to rounding
    assert contrasts(frame({"a": [1.0], "b": [2.0, 3.0]})).empty


def test_relative_gaps_are_above_the_floor():
    (pair,) = contrasts(frame({"a": [60.0, 62.0, 58.0], "b": [110.0, 108.0, 112.0]}), floor=10.0)[
        ["relative", "relative_low", "relative_high", "better", "pairs"]
    ].itertuples(index=False)
    assert pair.relative == pytest.approx(50 / 100 - 1)
    assert pair.relative_low < pair.relative < pair.relative_high < 0
    # the delta method by hand: variance of log(50) and of log(100), of means of three
    error = math.sqrt(4 / 3 / 50**2 + 4 / 3 / 100**2)
    low = 0.5 * math.exp(-stats.t.isf(0.025, 2.941) * error) - 1
    assert pair.relative_low == pytest.approx(low, abs=1e-3)
    assert (pair.better, pair.pairs) == (9, 9)
    assert contrasts(frame({"a": [1.0, 2.0], "b": [3.0, 5.0]})).relative.isna().all()


def test_variance_is_split_into_training_and_sampling():
    """The components are those of lmer(Yield ~ 1 + (1 | Batch), Dyestuff)."""
    rows = [("a", b, s, float(v)) for b, own in enumerate(DYESTUFF) for s, v in enumerate(own)]
    values = pd.DataFrame(rows, columns=["arm", "seed", "sampling_seed", "value"])
    assert tests.variance_split(values) == pytest.approx((1764.05, 2451.25), abs=0.01)
    both = pd.concat([values, values.assign(arm="b", value=values.value + 100)])
    assert tests.variance_split(both) == pytest.approx((1764.05, 2451.25), abs=0.01)
    assert tests.variance_split(values[values.sampling_seed == 0]) is None


@pytest.mark.parametrize(("dof", "t"), TABLE.items())
def test_intervals_are_those_of_the_tables(dof, t):
    values = [float(i * i % 7) for i in range(dof + 1)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert half_width(values) == pytest.approx(t * error, rel=1e-5)
    assert half_width([0.8, 0.8, 0.8]) == 0


def test_the_fewest_seeds_for_a_gap_are_those_of_80_percent_power():
    """power.t.test(delta = 1, sd = 1, power = 0.8) of R says n = 16.71."""
    assert tests.seeds_needed(1.0, 1.0) == 17
    assert tests.seeds_needed(1.0, 3.0) == 4  # n = 3.07
    assert tests.seeds_needed(1.0, 0.01) is None


def draws(arms: int, seeds: int, count: int, gap: float = 0.0) -> np.ndarray:
    """Values (count, arms, seeds) of spread 1, the first arm better by `gap`."""
    values = np.random.default_rng(0).normal(size=(count, arms, seeds))
    values[:, 0] -= gap
    return values


def judged(values: np.ndarray, test: str) -> list[pd.DataFrame]:
    names = [*"abcdef"[: values.shape[1]]]
    return [contrasts(frame(dict(zip(names, each, strict=True))), test) for each in values]


@pytest.mark.long
@pytest.mark.parametrize("drawn", first_fast([(3, 60), (3, 1200), (5, 1200), (10, 1200)]))
def test_intervals_cover_the_true_gap_in_19_of_20_draws(drawn):
    seeds, count = drawn
    found = judged(draws(3, seeds, count, gap=2.0), JOINT)
    own, every = [], []
    for each in found:
        signs = np.where(each.ahead == "a", 1, np.where(each.behind == "a", -1, 0))
        truth = 2.0 * signs
        own += [*((each.low <= truth) & (truth <= each.high))]
        every.append(((each.least <= truth) & (truth <= each.most)).all())
    allowed = 3.4 * math.sqrt(0.95 * 0.05 / count)
    assert np.mean(own) == pytest.approx(0.95, abs=allowed)
    assert np.mean(every) == pytest.approx(0.95, abs=allowed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("seeds", "gap", "count"), [(3, 3.0, 40), pytest.param(5, 2.0, 1000, marks=pytest.mark.slow)]
)
def test_the_default_has_more_power_than_pairing_of_different_networks(seeds, gap, count):
    values = draws(3, seeds, count, gap)
    power = {
        test: np.mean([each.significant.iloc[0] for each in judged(values, test)])
        for test in (JOINT, PAIRED)
    }
    assert power[JOINT] > power[PAIRED] + 0.2


@pytest.mark.slow
def test_the_gap_of_80_percent_power_is_found_in_four_of_five_draws():
    known = contrasts(frame({"a": [-1.0, 0.0, 1.0], "b": [-1.0, 0.0, 1.0]}), WELCH)
    gap = float(known.detectable.iloc[0])  # of spread 1
    draw = np.random.default_rng(0).normal(size=(2, 50_000, 3))
    found = stats.ttest_ind(draw[0] + gap, draw[1], axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert known.detectable_low.iloc[0] < gap < known.detectable_high.iloc[0]
