"""What a few seeds can say: intervals and paired tests by Student's t, corrected by Holm.

Degrees of freedom are whole numbers here, for which Student's distribution has a closed form
(Abramowitz and Stegun, 26.7.3 and 26.7.4).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05  # of every interval and test: 95 % confidence


def p_value(t: float, dof: int) -> float:
    """Two-sided: how often |T| is above |t| by chance, with `dof` degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(dof))
    square = math.cos(angle) ** 2
    term, total = (math.cos(angle), 0.0) if dof % 2 else (1.0, 0.0)
    for k in range(dof % 2, dof - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    total *= math.sin(angle)
    inside = (angle + total) * 2 / math.pi if dof % 2 else total
    return min(max(1 - inside, 0.0), 1.0)


def critical(level: float, dof: int) -> float:
    """The t that |T| is above with probability `level`."""
    low, high = 0.0, 1.0
    while p_value(high, dof) > level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, dof) > level else (low, middle)
    return high


def half_width(values: Sequence[float], level: float = LEVEL) -> float:
    """Of the confidence interval of the mean of two or more values."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return critical(level, len(values) - 1) * error


def paired_p_value(differences: Sequence[float]) -> float:
    """Of the paired t-test that two or more differences have the mean 0; they are not all one."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return p_value(statistics.mean(differences) / error, len(differences) - 1)


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
