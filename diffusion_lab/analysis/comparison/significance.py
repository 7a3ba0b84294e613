"""The significance of many tests of few seeds: Holm's correction, and the power of a test."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special, stats

from diffusion_lab.analysis.comparison.groups import LEVEL

POWER = 0.8  # the share of draws in which a detectable gap is significant


@dataclass(frozen=True)
class Tested:
    """A p-value, its value after correction for `tests` tests, and the level that it had to reach.

    The level is that of the uncorrected p-value.
    """

    p: float
    corrected: float
    level: float
    tests: int = 1


def detectable(error: float, degrees: float, level: float) -> float:
    """The true mean that a t-test at `level` finds in 80 % of draws with this standard error.

    The test statistic has a noncentral t distribution. A true mean as large as half the interval's
    width would be found in about half of the draws only.
    """
    threshold = stats.t.isf(level / 2, degrees)
    return float(special.nctdtrinc(degrees, 1 - POWER, threshold) * error)


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
        results[index] = Tested(p_values[index], corrected, level, len(order))
    return [results[index] for index in range(len(p_values))]
