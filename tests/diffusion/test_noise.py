"""The algebra of noise levels, and the predictions that are linear in it."""

import math

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture, through
from helpers.walks import SCHEDULES, by_type, every_schedule

from diffusion_lab.diffusion.noise import (
    NoiseLevel,
    add_noise,
    broadcast,
    jump,
    lowered,
    noise_of,
    renoise,
)
from diffusion_lab.diffusion.objective import EDM, X0, Eps, Flow, Score, V
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

PATHS = [Rectified(), Cosine(), VarianceExploding()]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def level_of(alpha, sigma):
    return NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in (0.5, alpha, sigma)))


def test_logsnr_and_its_ends():
    assert level_of(0.8, 0.6).logsnr.item() == pytest.approx(2 * math.log(0.8 / 0.6), abs=1e-15)
    assert level_of(1.0, 0.0).logsnr == math.inf
    assert level_of(0.0, 1.0).logsnr == -math.inf


def test_a_path_is_a_sequence_of_levels():
    path = Rectified()(torch.linspace(1, 0, 5))
    assert len(path) == 5
    assert [level.sigma.item() for level in path] == [1, 0.75, 0.5, 0.25, 0]
    assert path[1:3].alpha.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_multiply_in_the_dtype_of_the_image(dtype):
    x = draw(3, 1, 2, 2, dtype=dtype)
    sigma = broadcast(Rectified()(torch.tensor([0.25, 0.5, 1.0])).sigma, x)
    assert sigma.dtype == dtype
    assert sigma.shape == (3, 1, 1, 1)
    assert (sigma * x).dtype == dtype
    assert (broadcast(Rectified()(torch.tensor(0.3)).sigma, x) * x).dtype == dtype


def test_add_noise_gives_each_sample_its_own_level():
    x0, eps = draw(3, 1, 2, 2), draw(3, 1, 2, 2)
    level = Rectified()(torch.tensor([0.25, 0.5, 1.0]))
    x = add_noise(x0, eps, level)
    assert torch.equal(x[0], 0.75 * x0[0] + 0.25 * eps[0])
    assert torch.equal(x[2], eps[2])
    torch.testing.assert_close(noise_of(x, x0, level), eps)


@by_type("schedule", PATHS)
def test_jump_keeps_x0_and_eps(schedule):
    x0, eps = draw(4, 3), draw(4, 3)
    here, there = schedule(torch.tensor(1.0)), schedule(torch.tensor(0.4))
    for start, end in ((here, there), (there, here)):
        moved = jump(add_noise(x0, eps, start), x0, start, end)
        torch.testing.assert_close(moved, add_noise(x0, eps, end), atol=1e-12, rtol=1e-12)


@by_type("schedule", PATHS)
def test_jump_to_clean_data_is_exactly_alpha_x0(schedule):
    x0, x = draw(64, dtype=torch.float32), 80 * draw(64, dtype=torch.float32)
    for alpha in (1.0, 0.5):
        landed = jump(x, x0, schedule(torch.tensor(0.3)), level_of(alpha, 0.0))
        assert torch.equal(landed, alpha * x0)


def test_jump_of_a_batch_of_levels_is_that_of_each():
    x, x0, schedule = draw(3, 2, 2), draw(3, 2, 2), Cosine()
    here, there = schedule(torch.tensor([0.9, 0.5, 0.3])), schedule(torch.tensor([0.8, 0.1, 0.2]))
    together = jump(x, x0, here, there)
    for i in range(3):
        torch.testing.assert_close(together[i], jump(x[i], x0[i], here[i], there[i]))


def test_jump_forms_its_coefficients_in_float64():
    # here and there a millionth apart: in float32 their difference would be lost
    here, there = level_of(0.6, 0.8), level_of(0.6 + 8e-7, 0.8 - 6e-7)
    x0 = draw(64, dtype=torch.float32)
    exact = jump(torch.zeros(64, dtype=torch.float64), x0.double(), here, there)
    close = jump(torch.zeros(64), x0, here, there)
    torch.testing.assert_close(close.double(), exact, rtol=1e-6, atol=0)


def test_renoise_reaches_the_marginal_of_the_noisier_level():
    here, there = level_of(0.9, math.sqrt(0.19)), level_of(0.6, 0.8)
    x0, eps, noise = draw(5), torch.zeros(5), torch.zeros(5)
    assert torch.allclose(renoise(add_noise(x0, eps, here), here, there, noise), 0.6 * x0)
    # the coefficients of the two independent noises add up to sigma^2
    one, zero = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    kept = renoise(add_noise(zero, one, here), here, there, zero)
    fresh = renoise(zero, here, there, one)
    assert (kept**2 + fresh**2).item() == pytest.approx(0.64, abs=1e-15)


@by_type("schedule", PATHS)
@pytest.mark.parametrize("t_here", [1.0, 0.7])
def test_posterior_is_bayes_rule(schedule, t_here):
    x, x0 = draw(6), draw(6)
    here, there = schedule(torch.tensor(t_here)), schedule(torch.tensor(0.5))
    # x_there | x0 ~ N(alpha x0, sigma^2) times x_here | x_there ~ N(ratio x_there, large)
    ratio = here.alpha / there.alpha
    forward = here.sigma**2 - ratio**2 * there.sigma**2
    precision = 1 / there.sigma**2 + ratio**2 / forward
    bayes = (there.alpha * x0 / there.sigma**2 + ratio * x / forward) / precision
    left, small, large = lowered(here, there, 1.0)
    mean = jump(x, x0, here, left)
    torch.testing.assert_close(mean, bayes, atol=1e-12, rtol=1e-10)
    assert small.item() == pytest.approx(1 / precision.item(), rel=1e-12)
    assert large.item() == pytest.approx(forward.item(), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_posterior_keeps_the_marginal_for_every_eta(eta):
    here, there = level_of(0.6, 0.8), level_of(0.8, 0.6)
    one, zero = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    left, small, _ = lowered(here, there, eta)
    kept = jump(add_noise(zero, one, here), zero, here, left)
    assert (kept**2 + small).item() == pytest.approx(0.36, abs=1e-15)
    mean = jump(add_noise(one, zero, here), one, here, left)
    assert mean.item() == pytest.approx(0.8, abs=1e-15)
    if eta == 0:
        assert small == 0
        assert kept.item() == pytest.approx(0.6, abs=1e-15)


def test_posterior_on_clean_data_is_exact():
    x0, here = draw(8, dtype=torch.float32), level_of(0.6, 0.8)
    left, small, _ = lowered(here, level_of(1.0, 0.0), 1.0)
    assert torch.equal(jump(draw(8), x0, here, left).float(), x0)
    assert small == 0


PREDICTIONS = [Eps(), X0(), V(), Flow(), EDM(0.5), Score(), Score(scale_by_sigma=False)]


def images():
    return draw(2, 7, 1, 2, 2)


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


@every_schedule
@by_type("prediction", PREDICTIONS)
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


@pytest.mark.parametrize(("sigma_by_alpha", "does"), [(990.0, False), (1010.0, True)])
def test_a_prediction_of_the_noise_amplifies_where_there_is_1000_times_as_much_of_it(
    sigma_by_alpha, does
):
    level = NoiseLevel(*torch.tensor([1.0, 1 / sigma_by_alpha, 1.0], dtype=torch.float64))
    assert Eps().amplifies(level) is does
    assert not V().amplifies(level)


@every_schedule
@by_type("prediction", PREDICTIONS)
def test_to_x0_inverts_target_and_x0_gain_is_its_derivative(prediction, schedule):
    x0, eps = images()
    level = schedule(torch.linspace(0.05, 0.95, 7))
    x = add_noise(x0, eps, level)
    back = prediction.to_x0(prediction.target(x0, eps, level), x, level)
    torch.testing.assert_close(back, x0, atol=1e-11, rtol=1e-11)
    one = level[3]  # a scalar level gives the same
    alone = prediction.to_x0(prediction.target(x0[3:4], eps[3:4], one), x[3:4], one)
    torch.testing.assert_close(alone, back[3:4])
    slope = (prediction.to_x0(x0 + 1, x, level) - prediction.to_x0(x0, x, level)).abs()
    gain = column(prediction.x0_gain(level)).expand_as(slope)
    torch.testing.assert_close(gain, slope, atol=1e-11, rtol=1e-11)


def test_on_pure_noise_only_eps_and_the_score_say_nothing():
    end = Rectified()(torch.ones(()))
    gains = [prediction.x0_gain(end).item() for prediction in PREDICTIONS]
    assert gains == [math.inf, 1, 1, 1, 0.5, math.inf, math.inf]


def test_on_all_other_schedules_every_prediction_is_allowed():
    for schedule in SCHEDULES[1:]:
        for prediction in PREDICTIONS:
            assert prediction.x0_gain(schedule(torch.ones(()))).isfinite()
    assert Eps().x0_gain(DDPMLinear()(torch.ones(()))).item() == pytest.approx(157.4, abs=0.05)
    assert Eps().x0_gain(Cosine()(torch.ones(()))).item() == pytest.approx(math.exp(10))
