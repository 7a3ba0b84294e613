"""What a few seeds can say: intervals and paired tests by Student's t, corrected by Holm."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.05  # of every interval and test: 95 % confidence


def half_width(values: Sequence[float], level: float = LEVEL) -> float:
    """Half the width of the confidence interval of the mean of two or more values."""
    return float(stats.t.isf(level / 2, len(values) - 1) * stats.sem(values))


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
