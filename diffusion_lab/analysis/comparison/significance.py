"""What a few seeds can say: intervals and paired tests by Student's t, corrected by Holm."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.05  # of every interval and test: 95 % confidence


def half_width(values: Sequence[float], level: float = LEVEL) -> float:
    """Half the width of the confidence interval of the mean of two or more values."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.isf(level / 2, len(values) - 1)) * error


def paired_p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test for mean difference 0, of 2 or more unequal differences."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    t = statistics.mean(differences) / error
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


@dataclass(frozen=True)
class Tested:
    """A p-value among others: corrected, and the level that it had to be below itself."""

    p: float
    corrected: float
    level: float


def holm(p_values: Sequence[float]) -> list[Tested]:
    """Holm's step-down correction, in the order given.

    The lowest faces the strictest level; what comes after the first to fail faces the same as it.
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
