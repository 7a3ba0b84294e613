"""Samplers against exact solutions: order of convergence, invariances, recovered distributions."""

import weakref
from functools import partial

import pytest
import torch
from helpers.exact_denoiser import CLEAN, GaussianMixture, through
from helpers.pairs import each_once
from helpers.walks import SCHEDULES, every_schedule, replayed

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.objective import EDM, X0, Eps, Flow, V
from diffusion_lab.diffusion.sampler import (
    DEIS,
    IPNDM,
    Ancestral,
    AncestralDPMSolver,
    AnnealedLangevin,
    DPMSolver,
    Euler,
    Heun,
    PredictorCorrector,
    Restart,
    ReverseSDE,
    UniPC,
)
from diffusion_lab.diffusion.sampler.time_grid import Karras, UniformGrid, UniformLogSNR
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding

SAMPLERS = {
    "euler": Euler,
    "heun": Heun,
    "heun_churn": partial(Heun, churn=3.0, noise_scale=1.003),
    "ddpm": Ancestral,
    "ddpm_large": partial(Ancestral, variance="fixed_large"),
    "dpm_1": partial(DPMSolver, order=1),
    "dpm_2m": DPMSolver,
    "dpm_3m": partial(DPMSolver, order=3),
    "dpm_sde": partial(DPMSolver, eta=1.0),
    "unipc_1": partial(UniPC, order=1),
    "unipc_2": UniPC,
    "unipc_3": partial(UniPC, order=3),
    "ipndm": IPNDM,
    "deis": DEIS,
    "deis_2": partial(DEIS, order=2),
    "dpm_2s": partial(AncestralDPMSolver, eta=0.0),
    "dpm_2s_ancestral": AncestralDPMSolver,
    "restart": partial(Restart, restarts=[(0.1, 4.0, 2, 2)]),
    "reverse_sde": ReverseSDE,
    "annealed_langevin": AnnealedLangevin,
    "pc_langevin": PredictorCorrector,
    "pc_annealed": partial(PredictorCorrector, corrector="annealed"),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
# each sampler with one schedule; the other pairs are slow
every_sampler_on_a_schedule = pytest.mark.parametrize(
    ("sampler", "schedule"), each_once(SAMPLERS, {type(s).__name__: s for s in SCHEDULES})
)
MIXTURE = GaussianMixture([0.5, 0.2, 0.3], [-1.5, 0.3, 2.0], 0.4)
# in one dimension pc_langevin divides by an eps near 0, which amplifies rounding
WIDE = GaussianMixture([0.7, 0.3], [[0.5] * 8, [-1.0] * 8], 0.4)


def unit_noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_exact_denoiser_is_the_posterior_mean():
    level = Cosine()(torch.tensor(0.4))
    x0 = torch.linspace(-8, 8, 8001, dtype=torch.float64)  # computes Bayes' rule by quadrature
    prior = MIXTURE.weights * torch.exp(-((x0[:, None] - MIXTURE.means[:, 0]) ** 2) / 0.32)
    for x in (-1.0, 0.2, 3.0):
        joint = prior.sum(1) * torch.exp(-((x - level.alpha * x0) ** 2) / (2 * level.sigma**2))
        mean = (x0 * joint).sum() / joint.sum()
        estimate = MIXTURE.denoise(torch.full((1, 1), x, dtype=torch.float64), level).x0
        assert estimate.item() == pytest.approx(mean.item(), abs=1e-9)


@every_schedule
@pytest.mark.parametrize(
    ("sampler", "error"),
    [
        (Euler, 0.1),
        (Heun, 0.01),
        (DPMSolver, 0.01),
        (SAMPLERS["dpm_3m"], 0.005),
        (UniPC, 0.005),
        (SAMPLERS["unipc_3"], 0.005),
        (IPNDM, 0.002),
        (DEIS, 0.005),
        (SAMPLERS["dpm_2s"], 0.01),
        (partial(ReverseSDE, eta=0.0), 0.1),
    ],
)
def test_full_range_ends_on_the_exact_sample(sampler, error, schedule):
    noise, sampler = unit_noise(200, 1), sampler(60, UniformGrid())
    start = schedule(torch.tensor(1.0))
    exact = MIXTURE.transport(start.sigma * noise, start, CLEAN)
    x = sampler(MIXTURE.denoise, noise, schedule)
    assert (x - exact).square().mean().sqrt() < error


@every_schedule
@pytest.mark.parametrize(("sampler", "error"), [(Heun, 0.01), (DPMSolver, 0.02), (UniPC, 0.01)])
def test_a_walk_may_begin_at_any_level_of_the_schedule(sampler, error, schedule):
    for logsnr in (-1.0, 2.0, 4.0):
        here = schedule.at_logsnr(torch.tensor(logsnr, dtype=torch.float64))
        x0 = torch.linspace(-2, 2.5, 200, dtype=torch.float64)[:, None]
        x = here.alpha * x0 + here.sigma * unit_noise(200, 1)
        end = sampler(80, Karras(0.01)).finish(MIXTURE.denoise, x, here, schedule)
        exact = MIXTURE.transport(x, here, CLEAN)
        assert (end - exact).square().mean().sqrt() < error


@every_sampler_on_a_schedule
@pytest.mark.parametrize("shift", [-1e-12, 0, 1e-12])
def test_a_walk_that_begins_beside_a_level_of_the_grid_takes_no_tiny_step(sampler, schedule, shift):
    solver, image = sampler(8, UniformGrid()), torch.linspace(-1, 1, 9)
    levels = solver.time_grid(schedule, 8)
    asked = []

    def denoise(x, level):
        asked.append(level.logsnr)
        return Estimate(image.expand_as(x) + 1e-4 * x.tanh())

    here = schedule.at_logsnr(levels[4].logsnr + shift)
    end = solver.finish(denoise, torch.randn(3, 9), here, schedule)
    assert (end - image).abs().max() < 0.1
    gaps = torch.stack(asked).unique().diff()  # corrections ask again at a level
    # the middle of a step to a lower level may be anywhere
    assert (gaps > 0.1).all() or sampler is AncestralDPMSolver


def test_a_walk_from_below_the_grid_is_one_estimate():
    here = Rectified()(torch.tensor(0.01))
    x = unit_noise(20, 1)
    end = Heun(10, UniformGrid()).finish(MIXTURE.denoise, x, here, Rectified())
    torch.testing.assert_close(end, MIXTURE.denoise(x, here).x0, atol=1e-12, rtol=0)


@every_sampler_on_a_schedule
def test_all_allowed_predictions_draw_the_same_sample(sampler, schedule):
    noise = unit_noise(20, 8)

    def draw(denoise):
        torch.manual_seed(0)
        return sampler(12, UniformGrid())(denoise, noise, schedule)

    expected = draw(WIDE.denoise)
    for prediction in (X0(), Eps(), V(), Flow(), EDM(0.5)):
        if prediction.x0_gain(schedule(torch.ones(()))).isfinite():
            drawn = draw(through(prediction, WIDE.denoise))
            torch.testing.assert_close(drawn, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        *("euler", "ddpm", "dpm_2m", "dpm_3m", "dpm_sde", "dpm_2s_ancestral"),
        *("unipc_2", "unipc_3", "ipndm", "deis"),
    ],
)
def test_on_one_logsnr_grid_all_schedules_take_the_same_steps(name):
    sampler = SAMPLERS[name]
    logsnr, noise = torch.linspace(-7, 9, 25, dtype=torch.float64), unit_noise(50, 1)
    ends = []
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        levels = schedule.at_logsnr(logsnr)
        # the same point of the path x / alpha, which depends on logSNR alone
        start = levels[0].sigma * noise
        walk = sampler(24, UniformGrid()).walk
        *_, x = walk(MIXTURE.denoise, start, levels, schedule, torch.randn_like)
        ends.append(x / levels[-1].alpha)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-10, rtol=0)


@every_schedule
def test_euler_is_ddim_without_noise(schedule):
    euler, ddim = (
        sampler(10, UniformGrid())(MIXTURE.denoise, unit_noise(20, 1), schedule, randn_like=None)
        for sampler in (Euler, partial(Ancestral, eta=0.0))
    )
    torch.testing.assert_close(ddim, euler, atol=1e-13, rtol=0)


@every_sampler_on_a_schedule
@pytest.mark.parametrize("grid", [UniformGrid(), Karras(), UniformLogSNR()])
def test_a_known_image_is_returned_exactly_in_its_dtype(sampler, grid, schedule):
    image = torch.linspace(-1, 1, 9)

    def denoise(x, level):
        assert x.dtype == torch.float32
        assert level.sigma.dtype == torch.float64
        return Estimate(image.expand_as(x))

    for steps in (2, 5) if sampler is SAMPLERS["restart"] else (1, 2, 5):
        x = sampler(steps, grid)(denoise, torch.randn(3, 9), schedule)
        # IPNDM extrapolates its last step, too
        atol = 1e-5 if sampler is IPNDM else 0
        torch.testing.assert_close(x, image.expand(3, 9), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (Euler, 10),
        (Heun, 19),
        (Ancestral, 10),
        (DPMSolver, 10),
        (SAMPLERS["dpm_3m"], 10),
        (UniPC, 10),
        (IPNDM, 10),
        (DEIS, 10),
        (SAMPLERS["dpm_2s"], 19),
        (AncestralDPMSolver, 18),  # from pure noise, too, a step is one jump and fresh noise
        (partial(Restart, restarts=[]), 19),
        (partial(Restart, restarts=[(0.2, 2.0, 2, 3), (0.2, 1.0, 1, 1)]), 19 + 2 * 2 * 3 + 2),
        (ReverseSDE, 10),
        (AnnealedLangevin, 51),
        (PredictorCorrector, 20),
        (partial(PredictorCorrector, corrections=3), 40),
    ],
)
def test_network_calls_and_states_per_walk(sampler, calls):
    seen = []

    def denoise(x, level):
        seen.append(level.sigma.item())
        return MIXTURE.denoise(x, level)

    levels = UniformGrid()(Rectified(), 10)
    states = sampler(10, UniformGrid()).walk(
        denoise, unit_noise(2, 1), levels, Rectified(), torch.randn_like
    )
    assert sum(1 for _ in states) == 10
    assert len(seen) == calls
    assert min(seen) > 0  # the network is never called on clean data


@every_sampler
def test_a_walk_does_not_keep_its_states_alive(sampler):
    states = []

    def denoise(x, level):
        states.append(weakref.ref(x))
        assert sum(ref() is not None for ref in states) <= 4
        return MIXTURE.denoise(x, level)

    sampler(30, UniformGrid())(denoise, unit_noise(2, 1), Cosine())


@every_sampler
def test_a_sample_does_not_depend_on_the_others_in_its_batch(sampler):
    noise, draws = unit_noise(4, 8), torch.randn(99, 4, 8, dtype=torch.float64)

    def draw(n):
        of_these = replayed(draws[:, :n])
        return sampler(6, UniformGrid())(WIDE.denoise, noise[:n], VarianceExploding(), of_these)

    torch.testing.assert_close(draw(4)[:2], draw(2), atol=1e-12, rtol=0)
