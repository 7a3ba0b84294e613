"""Power-function averages: lengths, profiles, and any average made of a few others."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion_lab.diffusion.power_average import (
    LONGEST,
    coefficients,
    decay,
    gamma_of,
    inner_products,
    sigma_rel_of,
)

TRACKED = (0.05, 0.1)
STEPS = 4096


def profile(gamma: float, time: float, tau: torch.Tensor) -> torch.Tensor:
    """The profile of an average at the times tau, float64; 0 after its time."""
    return torch.where(tau <= time, (gamma + 1) / time * (tau / time) ** gamma, 0.0)


def walk(n: int = 50) -> torch.Tensor:
    """Weights that take random steps from where they begin, (STEPS, n) float64."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(STEPS, n, generator=generator, dtype=torch.float64)
    return torch.randn(n, generator=generator, dtype=torch.float64) + steps.cumsum(0) / 64


def error_of(weights: torch.Tensor, snapshots: int, sigma_rel: float) -> float:
    """The relative error of an average made of two others at so many times."""
    steps = [STEPS * place // snapshots for place in range(1, snapshots + 1)]
    known = {length: tracked(weights, length) for length in TRACKED}
    stored = torch.stack([known[length][step - 1] for step in steps for length in TRACKED])
    times = [float(step) for step in steps for _ in TRACKED]
    gammas = [gamma_of(length) for length in TRACKED] * snapshots
    factors, _ = coefficients(times, gammas, STEPS, gamma_of(sigma_rel))
    wanted = tracked(weights, sigma_rel)[-1]
    return ((factors @ stored - wanted).norm() / wanted.norm()).item()


def tracked(weights: torch.Tensor, sigma_rel: float) -> torch.Tensor:
    """The average at every step, (STEPS, n), by its profile over weights that stand still."""
    power = gamma_of(sigma_rel) + 1
    cumulative = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS)[:, None] ** power
    return (weights * cumulative.diff(dim=0)).cumsum(0) / cumulative[1:]


def test_gamma_and_sigma_rel_are_inverses_of_each_other():
    for sigma_rel in (1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, LONGEST):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    for gamma in (0.0, 0.5, 6.94, 16.97, 1000.0):
        assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-7)


def test_the_published_lengths_have_the_published_gammas():
    assert [round(gamma_of(length), 2) for length in TRACKED] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, math.inf, math.nan])
def test_other_lengths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel must be above 0"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("gamma", [0.0, 3.5, 16.97])
def test_sigma_rel_is_the_deviation_of_the_profile(gamma):
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * 7
    weights = profile(gamma, 7.0, tau) * 7 / 100_000
    mean = weights @ tau
    assert weights.sum() == pytest.approx(1, rel=1e-6)
    deviation = (weights @ (tau - mean) ** 2).sqrt() / 7
    assert deviation == pytest.approx(sigma_rel_of(gamma), rel=1e-6)


def test_inner_products_are_the_integrals():
    times, gammas = [2.0, 2.0, 5.0, 6.0], [16.97, 0.0, 6.94, 2.0]
    known = torch.tensor([times, gammas], dtype=torch.float64)
    products = inner_products(*known, *known)
    tau = (torch.arange(600_000, dtype=torch.float64) + 0.5) / 100_000
    profiles = torch.stack([profile(g, t, tau) for t, g in zip(times, gammas, strict=True)])
    torch.testing.assert_close(products, profiles @ profiles.T / 100_000, rtol=1e-4, atol=1e-6)


def test_the_average_of_steps_is_the_integral_over_the_profile():
    weights = walk(3)[:200]
    edges = torch.arange(201, dtype=torch.float64) / 200
    for gamma in (gamma_of(0.05), gamma_of(0.25)):
        average = torch.zeros(3, dtype=torch.float64)
        for step, now in enumerate(weights):  # as in training
            average.lerp_(now, 1 - decay(gamma, step, step + 1))
        torch.testing.assert_close(average, (edges ** (gamma + 1)).diff() @ weights)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.02, 0.03, 0.07, 0.15, 0.2, 0.25])
def test_32_snapshots_make_any_length_to_1_percent_and_more_make_it_better(sigma_rel):
    weights = walk()
    errors = [error_of(weights, snapshots, sigma_rel) for snapshots in (16, 32, 64, 128)]
    assert errors[1] < 0.01
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))


def test_lengths_that_are_kept_come_back_as_they_are():
    times, gammas = [1.0, 1.0, 2.0, 2.0], [gamma_of(length) for length in TRACKED] * 2
    for place in range(4):
        known = times[: place + 1], gammas[: place + 1]
        factors, error = coefficients(*known, times[place], gammas[place])
        wanted = torch.eye(4, dtype=torch.float64)[place, : place + 1]
        torch.testing.assert_close(factors, wanted, rtol=0, atol=1e-9)
        assert error < 1e-6


def test_weights_that_never_changed_come_back_exactly():
    for snapshots in (1, 3, 32):
        times = [float(step + 1) for step in range(snapshots) for _ in TRACKED]
        gammas = [gamma_of(length) for length in TRACKED] * snapshots
        for sigma_rel in (0.01, 0.25):
            factors, _ = coefficients(times, gammas, snapshots, gamma_of(sigma_rel))
            assert factors.sum() == pytest.approx(1, abs=1e-9)


def test_an_average_may_be_known_twice():
    gamma = gamma_of(0.05)
    factors, error = coefficients([1.0, 2.0, 2.0], [gamma] * 3, 2.0, gamma)
    assert factors.tolist() == pytest.approx([0, 0.5, 0.5], abs=1e-6)
    assert error < 1e-6
