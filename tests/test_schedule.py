"""Schedules: published values, exact ends, and the way back from logSNR."""

import math

import pytest
import torch

from diffusion_lab.schedule import (
    Cosine,
    DDPMLinear,
    NoiseSchedule,
    Rectified,
    VarianceExploding,
)

SCHEDULES = [Rectified(), Cosine(), DDPMLinear(), VarianceExploding()]


def at(schedule, t):
    level = schedule(torch.tensor(t, dtype=torch.float64))
    return level.alpha.item(), level.sigma.item()


def test_rectified_is_the_straight_path_with_exact_ends():
    assert at(Rectified(), 0.0) == (1, 0)
    assert at(Rectified(), 0.25) == (0.75, 0.25)
    assert at(Rectified(), 1.0) == (0, 1)


def test_cosine_walks_the_circle_between_logsnr_20_and_minus_20():
    ends = Cosine()(torch.tensor([0.0, 0.5, 1.0]))
    assert ends.logsnr.tolist() == pytest.approx([20, 0, -20], abs=1e-9)
    t = torch.linspace(0, 1, 101)
    level = Cosine()(t)
    assert torch.allclose(level.alpha**2 + level.sigma**2, torch.ones(101, dtype=torch.float64))
    angle = torch.atan2(level.sigma, level.alpha)
    assert torch.allclose(angle.diff(), angle.diff()[:1])  # constant speed
    assert (angle - t.double() * math.pi / 2).abs().max() < 5e-5  # and almost the plain cosine


def test_variance_exploding_is_geometric_between_its_ends():
    schedule = VarianceExploding(0.002, 80)
    assert at(schedule, 0.0) == pytest.approx((1, 0.002), rel=1e-12)
    assert at(schedule, 0.5) == pytest.approx((1, 0.4), rel=1e-12)  # sqrt(0.002 * 80)
    assert at(schedule, 1.0) == pytest.approx((1, 80), rel=1e-12)


@pytest.mark.parametrize("steps", [1000, 7])
def test_ddpm_linear_is_the_table_of_products(steps):
    schedule = DDPMLinear(steps, 1e-4, 0.02)
    assert schedule.discrete_steps == steps
    product = 1.0
    for i in range(steps):
        beta = 1e-4 + (0.02 - 1e-4) * i / (steps - 1)
        product *= 1 - beta
        alpha, sigma = at(schedule, (i + 1) / steps)  # index i sits at t = (i + 1) / N
        assert alpha == pytest.approx(math.sqrt(product), rel=1e-11)
        assert sigma == pytest.approx(math.sqrt(1 - product), rel=1e-9)


def test_ddpm_linear_published_end():
    alpha, sigma = at(DDPMLinear(), 1.0)
    assert alpha**2 == pytest.approx(4.0358e-5, rel=1e-4)
    assert sigma / alpha == pytest.approx(157.4, abs=0.05)


def test_ddpm_linear_between_the_points_of_its_table():
    schedule = DDPMLinear(10, 0.01, 0.2)
    below, between, above = (at(schedule, t)[0] for t in (0.3, 0.35, 0.4))
    assert between == pytest.approx(math.sqrt(below * above), rel=1e-12)  # log alpha linear
    assert at(schedule, 0.0) == (1, 0)
    # sigma keeps its digits where 1 - alpha^2 would lose them
    small = at(DDPMLinear(), 1e-12)[1]
    assert small == pytest.approx(math.sqrt(-math.expm1(1e-9 * math.log1p(-1e-4))), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_float64_keep_the_shape_and_fall_in_logsnr(schedule):
    level = schedule(torch.linspace(0, 1, 300, dtype=torch.float32).reshape(3, 100))
    assert level.t.dtype == level.alpha.dtype == level.sigma.dtype == torch.float64
    assert level.alpha.shape == level.sigma.shape == (3, 100)
    assert (level.logsnr.flatten().diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_logsnr_goes_back(schedule):
    t = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    level = schedule.at_logsnr(schedule(t).logsnr)
    torch.testing.assert_close(level.t, t, atol=1e-12, rtol=1e-10)
    assert torch.equal(level.alpha, schedule(level.t).alpha)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_forms_agree_with_bisection(schedule):
    logsnr = torch.linspace(-15, 15, 61, dtype=torch.float64)
    closed, bisected = schedule.at_logsnr(logsnr), NoiseSchedule.at_logsnr(schedule, logsnr)
    torch.testing.assert_close(closed.t, bisected.t, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(closed.sigma, bisected.sigma, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_logsnr_beyond_the_ends_is_the_end(schedule):
    t = schedule.at_logsnr(torch.tensor([-math.inf, -100.0, 100.0])).t
    assert t[0] == 1
    assert t[1] == pytest.approx(1, abs=1e-15)
    assert t[2] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: VarianceExploding(0.0, 80.0), "sigma_min=0.0"),
        (lambda: VarianceExploding(2.0, 1.0), "sigma_max=1.0"),
        (lambda: DDPMLinear(0), "steps=0"),
        (lambda: DDPMLinear(10, 0.2, 0.1), "beta_start=0.2"),
        (lambda: DDPMLinear(10, 0.2, 1.0), "beta_end=1.0"),
    ],
)
def test_impossible_settings_are_refused(build, word):
    with pytest.raises(ValueError, match=word):
        build()
