"""Student's t, intervals, and Holm's correction."""

import math
import statistics

import pytest

from diffusion_lab.analysis.comparison.groups import half_width
from diffusion_lab.analysis.comparison.pairs import holm

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
    assert half_width([5.0, 5.0]) == 0


def test_holm_corrects_in_the_order_given_and_never_falls():
    tested = holm([0.04, 0.01, 0.03])
    assert [each.corrected for each in tested] == pytest.approx([0.06, 0.03, 0.06])
    assert [each.p for each in tested] == [0.04, 0.01, 0.03]
    # 0.01 faces 0.05 / 3 and passes; 0.03 faces 0.05 / 2 and fails; 0.04 fails at its level, too
    assert [each.level for each in tested] == pytest.approx([0.025, 0.05 / 3, 0.025])
    assert holm([]) == []
    assert holm([0.02])[0].corrected == 0.02
    assert [each.corrected for each in holm([0.9, 0.8])] == [1, 1]
