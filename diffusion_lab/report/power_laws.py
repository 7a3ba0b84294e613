"""Scaling laws: a metric as a constant plus power laws, fitted to the means of seeds.

The form is m = E + A C^-b over training FLOPs C, or m = E + A N^-a + B D^-b over the size N and the
images D (arXiv:2203.15556, approach 3). The law has the least squares of log residuals: a point is
a mean over seeds, and there are too few points for a robust loss to find outliers among them.

P points, K power terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

DRAWS = 200  # of a bootstrap
TAIL = 0.025  # the part of the draws on either side of an interval
SPARE = 2  # points that a fit needs beyond its parameters
OFFSETS = (0.02, 0.5, 0.9)  # starts for E, as fractions of the lowest value
EXPONENTS = (0.1, 0.4, 1.2)  # starts for each exponent
CREDIBLE = (1e-3, 10.0)  # exponents beyond are those of a constant or of a step
STEEPEST = 1.02 * CREDIBLE[1]  # beyond it, a factor of 1e25 FLOPs would overflow
LARGEST = 500.0  # a logarithm whose exponential, and that of its negative, is a number
NO_OFFSET = 1e-4  # the fraction of the lowest value below which E is 0
SEEN = 1e-3  # the least share of a value, at some point, of a term that counts as found


@dataclass(frozen=True)
class PowerLaw:
    """The law m = offset + sum over k of factors[k] * x[k] ** -exponents[k]; nothing is negative.

    The law of a metric that does not fall by such a law has an exponent or a term near 0.
    """

    offset: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """The metric at x (K, P), or at x (P,) of a law with one term."""
        return self.offset + self.terms(x).sum(axis=0)

    def terms(self, x: ArrayLike) -> NDArray[np.float64]:
        """Each term at x (K, P)."""
        factors, exponents = np.array(self.factors)[:, None], np.array(self.exponents)[:, None]
        return factors * np.atleast_2d(np.asarray(x, dtype=float)) ** -exponents  # (K, P)

    def optimum(self, work: ArrayLike) -> NDArray[np.float64]:
        """The best size and images (2, P) with the product `work` (P,), by a law of both.

        The optimum has a A N^-a = b B D^-b, so that N = G work^(b / (a + b)) with
        G = (a A / (b B))^(1 / (a + b)) (arXiv:2203.15556, equation 4).
        """
        (factor, other), (a, b) = self.factors, self.exponents
        work = np.asarray(work, dtype=float)
        # in logarithms, since a draw of seeds may have factors far apart
        log = np.log([a, factor, b, other]) @ [1, 1, -1, -1] / (a + b)
        size = np.exp(log.clip(-LARGEST, LARGEST)) * work**self.optimal_size_exponent
        return np.stack([size, work / size])

    def along_front(self, unit: float) -> "PowerLaw":
        """The law of compute C along the optimum of a law of size and images, C = unit * N * D."""
        (best,) = PowerLaw(0.0, self.factors, self.exponents)(self.optimum([1.0]))
        a, b = self.exponents
        exponent = a * b / (a + b)
        return PowerLaw(self.offset, (float(best * unit**exponent),), (exponent,))

    @property
    def optimal_size_exponent(self) -> float:
        """The exponent of compute in the optimal size, b / (a + b)."""
        a, b = self.exponents
        return b / (a + b)


class NoLaw(Exception):
    """The values follow no law, or are too few; the message is the reason."""


def fit(x: ArrayLike, values: ArrayLike) -> PowerLaw:
    """Fits a law to values (P,) at positive x (K, P) or (P,); raises NoLaw if they follow none."""
    x, values = np.atleast_2d(np.asarray(x, dtype=float)), np.asarray(values, dtype=float)
    parameters = 1 + 2 * len(x)
    if len(values) < parameters + SPARE:
        needed = f"{parameters} parameters need {parameters + SPARE}"
        raise NoLaw(f"there are {len(values)} points, and {needed}")
    if values.min() <= 0 or np.ptp(values) <= 1e-6 * values.max():
        raise NoLaw("values are equal, or not all positive")
    logs = np.log(x)
    spread = np.linalg.svd(logs - logs.mean(axis=1, keepdims=True), compute_uv=False)
    if spread.min() <= 0.1 * spread.max():  # data cannot tell the terms apart
        raise NoLaw("sizes and numbers of images rise together")
    law = closest(x, values)
    # each term is visible at some point, and no exponent is at a limit
    shares = (law.terms(x) / law(x)).max(axis=1)
    low, high = CREDIBLE
    if not all(low < each < high for each in law.exponents) or shares.min() <= SEEN:
        raise NoLaw("values do not fall by such a law")
    return law


def closest(x: ArrayLike, values: ArrayLike, start: PowerLaw | None = None) -> PowerLaw:
    """The law of least squares of logarithms, from several starts, or from `start` alone."""
    from scipy import optimize  # late, as few comparisons have laws and it takes a second

    logs, targets = np.log(np.atleast_2d(np.asarray(x, float))), np.log(np.asarray(values, float))
    least, middle = np.exp(targets.min()), np.exp(np.median(targets))
    centre = logs.mean(axis=1, keepdims=True)  # factors there hardly depend on the exponents
    terms = len(logs)

    def parts(parameters: NDArray) -> tuple[NDArray, NDArray]:
        """The logarithms of E and of each term (1 + K, P), and the exponents (K, 1)."""
        offset, factors, exponents = np.split(parameters.clip(-LARGEST, LARGEST), (1, 1 + terms))
        steep = np.exp(exponents.clip(-12, np.log(STEEPEST)))[:, None]
        powers = factors[:, None] - steep * (logs - centre)
        return np.vstack([np.tile(offset, logs.shape[1]), powers]), steep

    def misses(parameters: NDArray) -> NDArray:
        return np.logaddexp.reduce(parts(parameters)[0]) - targets

    def slopes(parameters: NDArray) -> NDArray:
        each, steep = parts(parameters)
        shares = np.exp(each - np.logaddexp.reduce(each))
        return np.vstack([shares, -shares[1:] * steep * (logs - centre)]).T

    if start is None:
        starts = [
            [np.log(part * least), *[np.log((middle - part * least) / terms)] * terms, *exponents]
            for part, *exponents in product(OFFSETS, *[np.log(EXPONENTS)] * terms)
        ]
    else:
        # an offset of almost 0 has no slope in its logarithm, from which no step leads away
        offset = max(start.offset, OFFSETS[0] * least)
        factors = np.log(start.factors) - np.array(start.exponents) * centre[:, 0]
        starts = [[np.log(offset), *factors, *np.log(start.exponents)]]
    # all parameters are logarithms, which need no bounds
    how: dict[str, Any] = {"method": "lm", "xtol": 1e-10, "ftol": 1e-10, "max_nfev": 200}
    tries = [optimize.least_squares(misses, first, slopes, **how) for first in starts]
    best = min(tries, key=lambda each: each.cost).x.clip(-LARGEST, LARGEST)
    steep = parts(best)[1]
    factors = np.exp(best[1 : 1 + terms] + (steep * centre)[:, 0])
    offset = float(np.exp(best[0]))
    if offset < NO_OFFSET * least:  # its logarithm goes on falling
        offset = 0.0
    return PowerLaw(offset, tuple(factors.tolist()), tuple(steep[:, 0].tolist()))


def bootstrap(
    law: PowerLaw, x: ArrayLike, seeds: Sequence[Sequence[float]], draws: int = DRAWS
) -> list[PowerLaw]:
    """Fits of draws of training seeds, with replacement at each of the P points.

    Returns none if a point has one seed. The deviation of a drawn mean is enlarged, because few
    seeds understate the variance of their mean: by sqrt(n / (n - 1)) for n seeds, and by the ratio
    of Student's t to the normal quantile (arXiv:1411.5279, expanded percentile interval). The draws
    are the same in each call.
    """
    if min(map(len, seeds)) < 2:
        return []
    generator = np.random.default_rng(0)
    freedom = sum(len(values) - 1 for values in seeds)
    wider = special.stdtrit(freedom, TAIL) / special.ndtri(TAIL)
    columns = []  # a draw is a row
    for values in map(np.asarray, seeds):
        count = len(values)
        drawn = values[generator.integers(count, size=(draws, count))]
        # in logarithms no draw is negative
        gaps = np.log(drawn).mean(axis=1) - np.log(values).mean()
        columns.append(values.mean() * np.exp(gaps * wider * np.sqrt(count / (count - 1))))
    return [closest(x, means, law) for means in np.stack(columns, axis=1)]


def interval(values: ArrayLike) -> tuple[float, float]:
    """The middle 95 % of values."""
    low, high = np.quantile(np.asarray(values), [TAIL, 1 - TAIL])
    return float(low), float(high)


def misfit(law: PowerLaw, x: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """Relative errors of the law at x, (P,): 0.1 where it is 10 % above or below a value."""
    return np.abs(law(x) / np.asarray(values) - 1)
