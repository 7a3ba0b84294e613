"""Prediction types: published targets, one inverse, and the gain that decides what is allowed."""

import math

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture, through

from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.objective import (
    EDM,
    X0,
    Eps,
    Flow,
    Score,
    V,
)
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

PREDICTIONS = [Eps(), X0(), V(), Flow(), EDM(0.5), Score(), Score(scale_by_sigma=False)]
SCHEDULES = [Rectified(), Cosine(), DDPMLinear(), VarianceExploding()]


def images(n=7):
    return torch.randn(n, 1, 2, 2, dtype=torch.float64), torch.randn(n, 1, 2, 2).double()


def column(value):
    return value[:, None, None, None]


def test_targets_are_the_published_ones():
    x0, eps = images()
    level = Cosine()(torch.linspace(0.1, 0.9, 7))
    alpha, sigma = column(level.alpha), column(level.sigma)
    assert torch.equal(Eps().target(x0, eps, level), eps)
    assert torch.equal(X0().target(x0, eps, level), x0)
    assert torch.allclose(V().target(x0, eps, level), alpha * eps - sigma * x0)
    assert torch.equal(Flow().target(x0, eps, level), eps - x0)


def test_the_score_is_the_gradient_of_the_log_density_given_x0():
    x0, eps = images()
    level = Cosine()(torch.linspace(0.1, 0.9, 7))
    x = add_noise(x0, eps, level).requires_grad_()
    alpha, sigma = column(level.alpha), column(level.sigma)
    log_density = -((x - alpha * x0) / sigma).square().sum() / 2
    (score,) = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(Score(scale_by_sigma=False).target(x0, eps, level), score)
    torch.testing.assert_close(Score().target(x0, eps, level), sigma * score)
    assert Score().scale_by_sigma


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_all_predictions_agree_on_one_posterior_mean(prediction, schedule):
    mixture = GaussianMixture([0.2, 0.5, 0.3], [-1.0, 0.1, 0.8], 0.2)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for level in schedule(torch.tensor([0.002, 0.1, 0.6, 0.9, 1.0])):
        if prediction.x0_gain(level).isfinite():
            state = level.alpha * x + level.sigma * x.flip(0)
            expected = mixture.denoise(state, level).x0
            other = through(prediction, mixture.denoise)(state, level).x0
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-10)


def test_edm_is_its_published_preconditioning():
    x0, eps = images()
    output, std = torch.randn_like(x0), 0.7
    level = VarianceExploding()(torch.linspace(0.1, 0.9, 7))
    sigma = column(level.sigma)
    c_skip = std**2 / (sigma**2 + std**2)
    c_out = sigma * std / (sigma**2 + std**2).sqrt()
    x = add_noise(x0, eps, level)
    torch.testing.assert_close(EDM(std).to_x0(output, x, level), c_skip * x + c_out * output)
    torch.testing.assert_close(EDM(std).target(x0, eps, level), (x0 - c_skip * x) / c_out)
    torch.testing.assert_close(column(EDM(std).x0_gain(level)), c_out)


def test_edm_of_unit_data_is_minus_v_on_the_circle():
    level = Cosine()(torch.linspace(0, 1, 9))
    for edm, v in zip(EDM(1.0).mix(level), V().mix(level), strict=True):
        torch.testing.assert_close(edm, -v)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_inverts_target(prediction, schedule):
    x0, eps = images()
    level = schedule(torch.linspace(0.05, 0.95, 7))
    x = add_noise(x0, eps, level)
    back = prediction.to_x0(prediction.target(x0, eps, level), x, level)
    torch.testing.assert_close(back, x0, atol=1e-11, rtol=1e-11)
    one = level[3]  # a scalar level gives the same
    alone = prediction.to_x0(prediction.target(x0[3:4], eps[3:4], one), x[3:4], one)
    torch.testing.assert_close(alone, back[3:4])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_gain_is_the_derivative_of_to_x0(prediction, schedule):
    level = schedule(torch.linspace(0.05, 0.95, 7))
    output, x = (image[:, 0, 0, 0] for image in images())
    slope = prediction.to_x0(output + 1, x, level) - prediction.to_x0(output, x, level)
    torch.testing.assert_close(prediction.x0_gain(level), slope.abs(), atol=1e-11, rtol=1e-11)


def test_on_pure_noise_only_eps_and_the_score_say_nothing():
    end = Rectified()(torch.ones(()))
    assert [prediction.x0_gain(end).item() for prediction in PREDICTIONS] == [
        math.inf,
        1,
        1,
        1,
        0.5,
        math.inf,
        math.inf,
    ]


def test_on_all_other_schedules_every_prediction_is_allowed():
    for schedule in SCHEDULES[1:]:
        for prediction in PREDICTIONS:
            assert prediction.x0_gain(schedule(torch.ones(()))).isfinite()
    assert Eps().x0_gain(DDPMLinear()(torch.ones(()))).item() == pytest.approx(157.4, abs=0.05)
    assert Eps().x0_gain(Cosine()(torch.ones(()))).item() == pytest.approx(math.exp(10))
