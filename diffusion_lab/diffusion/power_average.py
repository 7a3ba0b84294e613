"""Averages of weights by powers of time, and any one of them from a few (arXiv:2312.02696).

The average of length sigma_rel at time t weighs the weights of time tau in [0, t] by its profile,
(gamma + 1) tau^gamma / t^(gamma + 1), whose standard deviation is sigma_rel t. n averages of any
lengths and times; times have any unit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 1 / math.sqrt(12)  # sigma_rel of the plain mean of all weights, gamma = 0


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of a profile as a share of the time, for gamma of at least 0."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The gamma of a length in (0, LONGEST], the inverse of `sigma_rel_of`, which falls in gamma.

    Raises ValueError for another length.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel must be above 0 and at most {LONGEST:.4g}, got {sigma_rel}")
    low, high = 0.0, 1 / sigma_rel
    for _ in range(100):  # bisection, beyond the last digit
        gamma = (low + high) / 2
        low, high = (gamma, high) if sigma_rel_of(gamma) > sigma_rel else (low, gamma)
    return high


def decay(gamma: float, before: float, now: float) -> float:
    """The factor of the average of time `before` in the average of time `now`.

    The rest is the share of the weights of that interval, so that the average is exactly the
    integral over its profile; an average that begins, at time 0, is replaced.
    """
    return (before / now) ** (gamma + 1)


def inner_products(times: Tensor, gammas: Tensor, others: Tensor, other_gammas: Tensor) -> Tensor:
    """The integrals of products of profiles, (n, m), for float64 times and gammas (n,), (m,)."""
    times, gammas = times[:, None], gammas[:, None]
    latest = torch.maximum(times, others)
    ratio = torch.minimum(times, others) / latest
    gamma_of_latest = torch.where(times > others, gammas, other_gammas)
    factors = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return factors * ratio**gamma_of_latest / latest


def coefficients(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[Tensor, float]:
    """The combination of n averages whose profile is closest to that of `gamma` at `time`.

    Returns coefficients (n,) float64, and the distance of the profiles as a share of the wanted
    one's norm, both in L2. Coefficients add up to 1, so that weights which never changed come back
    exactly. Averages of times after `time` only make the result worse: leave them out.
    """
    n = len(times)
    known = torch.tensor([times, gammas], dtype=torch.float64)
    target = torch.tensor([[time], [gamma]], dtype=torch.float64)
    products, wanted = inner_products(*known, *known), inner_products(*known, *target)[:, 0]
    norm = inner_products(*target, *target)[0, 0]
    # least squares with a Lagrange multiplier for the sum, on profiles of unit norm
    scale = products.diagonal().rsqrt()
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = products * scale * scale[:, None]
    system[:n, n] = system[n, :n] = scale
    right = torch.cat([wanted * scale, torch.ones(1, dtype=torch.float64)])
    # gelsd: two averages may be the same, or nearly
    solution = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution
    found = solution[:n, 0] * scale
    distance = norm - 2 * found @ wanted + found @ products @ found
    return found, math.sqrt(max(distance.item(), 0.0) / norm.item())
