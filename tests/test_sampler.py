"""Samplers against exact solutions: order of convergence, invariances, recovered distributions."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from exact_denoiser import GaussianMixture, through

from diffusion_lab.denoiser import Estimate
from diffusion_lab.noise import NoiseLevel
from diffusion_lab.objective import EDM, X0, Eps, Flow, V
from diffusion_lab.sampler import Ancestral, DPMSolver, Euler, Heun
from diffusion_lab.sampler.time_grid import Karras, Uniform, UniformLogSNR
from diffusion_lab.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

SCHEDULES = [Rectified(), Cosine(), DDPMLinear(), VarianceExploding()]
SAMPLERS = [Euler, Heun, DPMSolver, Ancestral]
MIXTURE = GaussianMixture([0.5, 0.2, 0.3], [-1.5, 0.3, 2.0], 0.4)
CLEAN = NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def named(values):
    return pytest.mark.parametrize(
        values[0], values[1], ids=lambda v: getattr(v, "__name__", type(v).__name__)
    )


def unit_noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(sampler, denoise, x, levels):
    for state in sampler.walk(denoise, x, levels, None, torch.randn_like):
        x = state
    return x


def test_the_exact_denoiser_is_the_posterior_mean():
    level = Cosine()(torch.tensor(0.4))
    x0 = torch.linspace(-8, 8, 8001, dtype=torch.float64)  # Bayes' rule by quadrature
    prior = MIXTURE.weights * torch.exp(-((x0[:, None] - MIXTURE.means[:, 0]) ** 2) / 0.32)
    for x in (-1.0, 0.2, 3.0):
        joint = prior.sum(1) * torch.exp(-((x - level.alpha * x0) ** 2) / (2 * level.sigma**2))
        mean = (x0 * joint).sum() / joint.sum()
        estimate = MIXTURE.denoise(torch.full((1, 1), x, dtype=torch.float64), level).x0
        assert estimate.item() == pytest.approx(mean.item(), abs=1e-9)


@named(("schedule", SCHEDULES))
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2), (DPMSolver, 2)])
def test_order_of_convergence(sampler, order, schedule):
    start, end = schedule(torch.tensor([0.95, 0.05]))
    x = start.alpha * torch.linspace(-2, 2.5, 100).double()[:, None]
    x = x + start.sigma * unit_noise(100, 1)
    exact = MIXTURE.transport(x, start, end)
    counts = torch.tensor([20, 40, 80, 160])
    errors = []
    for steps in counts.tolist():
        levels = schedule(torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64))
        error = run(sampler(steps, Uniform()), MIXTURE.denoise, x, levels) - exact
        errors.append(error.square().mean().sqrt().log())
    steps, errors = counts.double().log(), torch.stack(errors)
    steps, errors = steps - steps.mean(), errors - errors.mean()
    slope = -(steps @ errors) / (steps @ steps)
    assert slope.item() == pytest.approx(order, abs=0.15)


@named(("schedule", SCHEDULES))
@pytest.mark.parametrize(("sampler", "error"), [(Euler, 0.1), (Heun, 0.01), (DPMSolver, 0.01)])
def test_full_range_ends_on_the_exact_sample(sampler, error, schedule):
    noise, sampler = unit_noise(200, 1), sampler(60, Uniform())
    start = schedule(torch.tensor(1.0))
    exact = MIXTURE.transport(start.sigma * noise, start, CLEAN)
    x = sampler(MIXTURE.denoise, noise, schedule)
    assert (x - exact).square().mean().sqrt() < error


@named(("schedule", SCHEDULES))
@named(("sampler", SAMPLERS))
def test_all_allowed_predictions_draw_the_same_sample(sampler, schedule):
    noise = unit_noise(20, 1)

    def draw(denoise):
        torch.manual_seed(0)
        return sampler(12, Uniform())(denoise, noise, schedule)

    expected = draw(MIXTURE.denoise)
    for prediction in (X0(), Eps(), V(), Flow(), EDM(0.5)):
        if prediction.x0_gain(schedule(torch.ones(()))).isfinite():
            torch.testing.assert_close(
                draw(through(prediction, MIXTURE.denoise)), expected, atol=1e-10, rtol=0
            )


@pytest.mark.parametrize("sampler", [Euler, DPMSolver])
def test_on_one_logsnr_grid_all_schedules_take_the_same_steps(sampler):
    logsnr, noise = torch.linspace(-7, 9, 25, dtype=torch.float64), unit_noise(50, 1)
    ends = []
    for schedule in SCHEDULES:
        levels = schedule.at_logsnr(logsnr)
        # one point of the path x / alpha, which depends on logSNR alone
        x = run(sampler(24, Uniform()), MIXTURE.denoise, levels[0].sigma * noise, levels)
        ends.append(x / levels[-1].alpha)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-10, rtol=0)


def test_the_end_of_the_ode_does_not_depend_on_the_schedule():
    logsnr, noise = torch.linspace(-7, 9, 401, dtype=torch.float64), unit_noise(50, 1)
    for schedule in SCHEDULES:
        levels = schedule.at_logsnr(logsnr)
        x = run(Heun(400, Uniform()), MIXTURE.denoise, levels[0].sigma * noise, levels)
        exact = MIXTURE.transport(levels[0].sigma * noise, levels[0], levels[-1])
        torch.testing.assert_close(x, exact, atol=1e-3, rtol=0)


@named(("schedule", SCHEDULES))
def test_euler_is_ddim_without_noise(schedule):
    noise = unit_noise(20, 1)
    euler = Euler(10, Uniform())(MIXTURE.denoise, noise, schedule)
    ddim = Ancestral(10, Uniform(), eta=0.0)
    x = ddim(MIXTURE.denoise, noise, schedule, randn_like=None)  # draws nothing
    torch.testing.assert_close(x, euler, atol=1e-13, rtol=0)


def test_euler_and_heun_are_the_textbook_ones_on_the_straight_path():
    levels, x = Rectified()(torch.tensor([0.8, 0.5])), unit_noise(20, 1)

    def velocity(x, level):
        x0 = MIXTURE.denoise(x, level).x0
        return (x - x0) / level.t  # eps - x0

    slope = velocity(x, levels[0])
    guess = x - 0.3 * slope
    euler = run(Euler(1, Uniform()), MIXTURE.denoise, x, levels)
    torch.testing.assert_close(euler, guess, atol=1e-7, rtol=0)
    heun = run(Heun(1, Uniform()), MIXTURE.denoise, x, levels)
    average = (slope + velocity(guess, levels[1])) / 2
    torch.testing.assert_close(heun, x - 0.3 * average, atol=1e-7, rtol=0)


@named(("schedule", SCHEDULES))
@pytest.mark.parametrize(
    ("eta", "variance", "steps"),
    # at 100 steps and eta = 1 the modes' stds are still 3 to 6 % off, as they should be: see below
    [(0.5, "fixed_small", 100), (1.0, "fixed_small", 400), (1.0, "fixed_large", 400)],
)
def test_ancestral_sampling_recovers_an_unbalanced_mixture(eta, variance, steps, schedule):
    torch.manual_seed(0)
    mixture = GaussianMixture([0.6, 0.3, 0.1], [[-2.0, 0.0], [1.0, 2.0], [2.0, -1.5]], 0.5)
    noise = torch.randn(8000, 2, dtype=torch.float64)
    x = Ancestral(steps, Uniform(), eta, variance)(mixture.denoise, noise, schedule)
    nearest = torch.cdist(x, mixture.means).argmin(1)
    for mode, weight in enumerate(mixture.weights):
        members = x[nearest == mode]
        assert len(members) / 8000 == pytest.approx(weight.item(), abs=0.02)
        torch.testing.assert_close(members.mean(0), mixture.means[mode], atol=0.05, rtol=0)
        assert members.std(0).mean().item() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_chain_of_a_gaussian_has_its_known_variance(variance, steps):
    torch.manual_seed(0)
    std, schedule = 0.5, DDPMLinear()
    noise = torch.randn(20_000, 1, dtype=torch.float64)
    sampler = Ancestral(steps, Uniform(), 1.0, variance)
    x = sampler(GaussianMixture([1.0], [0.0], std).denoise, noise, schedule)

    # DDPM's own formulas, in alpha_bar and beta of the shortened chain
    alpha_bar = [level.alpha.item() ** 2 for level in Uniform()(schedule, steps)]
    known = 1 - alpha_bar[0]
    for now, before in pairwise(alpha_bar):
        beta = 1 - now / before
        gain = math.sqrt(now) * std**2 / (now * std**2 + 1 - now)  # of x0_hat in x
        slope = math.sqrt(before) * beta / (1 - now) * gain
        slope += math.sqrt(1 - beta) * (1 - before) / (1 - now)
        added = beta if variance == "fixed_large" else beta * (1 - before) / (1 - now)
        known = slope**2 * known + (added if before < 1 else 0)
    assert x.var().item() == pytest.approx(known, rel=0.04)


@named(("schedule", SCHEDULES))
@named(("sampler", SAMPLERS))
@pytest.mark.parametrize("grid", [Uniform(), Karras(), UniformLogSNR()])
def test_a_known_image_is_returned_exactly_in_its_dtype(sampler, grid, schedule):
    image = torch.linspace(-1, 1, 9)

    def denoise(x, level):
        assert x.dtype == torch.float32
        assert level.sigma.dtype == torch.float64
        return Estimate(image.expand_as(x))

    for steps in (1, 2, 5):
        x = sampler(steps, grid)(denoise, torch.randn(3, 9), schedule)
        assert torch.equal(x, image.expand(3, 9))


@pytest.mark.parametrize(("sampler", "calls"), [(Euler, 10), (Heun, 19), (DPMSolver, 10)])
def test_network_calls_and_states_per_walk(sampler, calls):
    seen = []

    def denoise(x, level):
        seen.append(level.sigma.item())
        return MIXTURE.denoise(x, level)

    levels = Uniform()(Rectified(), 10)
    states = sampler(10, Uniform()).walk(
        denoise, unit_noise(2, 1), levels, Rectified(), torch.randn_like
    )
    assert sum(1 for _ in states) == 10
    assert len(seen) == calls
    assert min(seen) > 0  # never asked about clean data


@named(("sampler", SAMPLERS))
def test_two_calls_with_the_same_draws_agree(sampler):
    sampler, noise = sampler(7, Uniform()), unit_noise(5, 1)
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(sampler(MIXTURE.denoise, noise, Cosine()))
    assert torch.equal(*draws)


@named(("sampler", SAMPLERS))
def test_a_walk_does_not_keep_its_states_alive(sampler):
    states = []

    def denoise(x, level):
        states.append(weakref.ref(x))
        assert sum(ref() is not None for ref in states) <= 4
        return MIXTURE.denoise(x, level)

    sampler(30, Uniform())(denoise, unit_noise(2, 1), Cosine())


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Euler(0, Uniform()), "steps=0"),
        (lambda: Ancestral(5, Uniform(), eta=1.5), "eta=1.5"),
        (lambda: Ancestral(5, Uniform(), variance="learned"), "fixed_small, fixed_large"),
    ],
)
def test_impossible_settings_are_refused(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def test_dpm_solver_extrapolates_in_logsnr():
    # an estimate linear in logSNR is extrapolated to the middle of the second step
    schedule, x = VarianceExploding(0.1, 10.0), torch.zeros(1, dtype=torch.float64)
    levels = schedule(torch.tensor([1.0, 0.6, 0.4]))
    estimates = {level.t.item(): level.logsnr for level in levels}
    first, second = (
        state.item()
        for state in DPMSolver(2, Uniform()).walk(
            lambda x, level: Estimate(estimates[level.t.item()].expand_as(x)),
            x,
            levels,
            schedule,
            None,
        )
    )
    sigma, middle = levels.sigma, (levels.logsnr[1] + levels.logsnr[2]) / 2
    expected = (1 - sigma[1] / sigma[0]) * levels.logsnr[0]
    assert first == pytest.approx(expected.item(), rel=1e-12)
    expected = sigma[2] / sigma[1] * first + (1 - sigma[2] / sigma[1]) * middle
    assert second == pytest.approx(expected.item(), rel=1e-12)
    assert math.isfinite(second)
