"""Student's t, intervals, and Holm's correction."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from diffusion_lab.analysis.comparison.groups import half_width
from diffusion_lab.analysis.comparison.significance import detectable, holm

# Student's t, two-sided 95 %, by degrees of freedom, from a printed table
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}


@pytest.mark.parametrize(("dof", "t"), TABLE.items())
def test_intervals_are_those_of_the_tables(dof, t):
    values = [float(i * i % 7) for i in range(dof + 1)]
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert half_width(values) == pytest.approx(t * error, rel=1e-5)


def test_the_half_width_of_three_values():
    # mean 2, standard deviation 1: t(2) / sqrt(3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert half_width([5.0, 5.0]) == half_width([0.8, 0.8, 0.8]) == 0


def spread_of_one(count: int) -> list[float]:
    """Values of standard deviation 1."""
    values = np.arange(count)
    return list(values / values.std(ddof=1))


@pytest.mark.parametrize(("seeds", "level"), [(2, 0.05), (3, 0.05 / 3), (5, 0.05), (10, 0.05 / 12)])
def test_a_detectable_gap_is_found_in_four_of_five_draws(seeds, level):
    gap = detectable(1 / math.sqrt(seeds), seeds - 1, level)
    draws = np.random.default_rng(0).normal(size=(100_000, seeds))
    found = stats.ttest_1samp(draws + gap, 0, axis=1).pvalue < level
    assert found.mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("degrees", [1, 1.3, 2, 5])
@pytest.mark.parametrize("level", [0.05, 0.05 / 2484])
def test_a_detectable_gap_has_80_percent_power_at_few_degrees_and_strict_levels(degrees, level):
    gap = detectable(1.0, degrees, level)
    threshold = stats.t.isf(level / 2, degrees)
    # the noncentral t distribution by an integral over the chi distribution of the spread
    spreads = np.linspace(0, 2 * gap / threshold, 20_001)[1:]
    density = stats.chi.pdf(spreads * math.sqrt(degrees), degrees) * math.sqrt(degrees)
    power = np.trapezoid(stats.norm.cdf(gap - threshold * spreads) * density, spreads)
    assert power == pytest.approx(0.8, abs=0.003)


def test_the_least_significant_gap_is_found_in_half_of_the_draws_only():
    draws = np.random.default_rng(0).normal(size=(100_000, 10))
    found = stats.ttest_1samp(draws + half_width(spread_of_one(10)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.5, abs=0.03)


def test_holm_corrects_in_the_order_given_and_never_falls():
    tested = holm([0.04, 0.01, 0.03])
    assert [each.corrected for each in tested] == pytest.approx([0.06, 0.03, 0.06])
    assert [each.p for each in tested] == [0.04, 0.01, 0.03]
    # 0.01 faces 0.05 / 3 and passes; 0.03 faces 0.05 / 2 and fails; 0.04 fails at its level, too
    assert [each.level for each in tested] == pytest.approx([0.025, 0.05 / 3, 0.025])
    assert holm([]) == []
    assert holm([0.02])[0].corrected == 0.02
    assert [each.corrected for each in holm([0.9, 0.8])] == [1, 1]
