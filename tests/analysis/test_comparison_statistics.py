"""Student's t in closed form, intervals, the paired test and Holm's correction."""

import math

import pytest

from diffusion_lab.analysis.comparison.significance import (
    critical,
    half_width,
    holm,
    p_value,
    paired_p_value,
)

# two-sided 95 %, as printed in every book of tables
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}


@pytest.mark.parametrize(("dof", "t"), TABLE.items())
def test_critical_values_are_those_of_the_tables(dof, t):
    assert critical(0.05, dof) == pytest.approx(t, rel=1e-5)
    assert p_value(t, dof) == pytest.approx(0.05, rel=1e-4)


def test_one_and_two_degrees_of_freedom_have_short_forms():
    for t in (0.0, 0.3, 1.0, 4.0, 50.0):
        assert p_value(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-14)
        assert p_value(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)


def test_scipy_agrees():
    stats = pytest.importorskip("scipy.stats")
    for dof in range(1, 40):
        for t in (0.01, 0.7, 2.0, 9.0):
            assert p_value(t, dof) == pytest.approx(2 * stats.t.sf(t, dof), abs=1e-13)
    a, b = [3.1, 4.0, 5.5, 4.4], [2.0, 4.1, 4.6, 3.0]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert paired_p_value(differences) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-10)


def test_the_half_width_of_three_values():
    # mean 2, deviation 1: t(2) / sqrt(3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert half_width([5.0, 5.0]) == 0


def test_the_paired_test_of_two_seeds():
    # mean 3, deviation sqrt(2): t = 3 with one degree of freedom
    assert paired_p_value([2.0, 4.0]) == pytest.approx(1 - 2 * math.atan(3) / math.pi)


def test_holm_corrects_in_the_order_given_and_never_falls():
    tested = holm([0.04, 0.01, 0.03])
    assert [each.corrected for each in tested] == pytest.approx([0.06, 0.03, 0.06])
    assert [each.p for each in tested] == [0.04, 0.01, 0.03]
    # 0.01 faces 0.05 / 3 and passes; 0.03 faces 0.05 / 2 and fails; so does what comes after it
    assert [each.level for each in tested] == pytest.approx([0.025, 0.05 / 3, 0.025])
    assert holm([]) == []
    assert holm([0.02])[0].corrected == 0.02
    assert [each.corrected for each in holm([0.9, 0.8])] == [1, 1]
