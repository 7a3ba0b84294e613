"""Stochastic samplers against the distributions and the chains that they should draw from."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.pairs import each_once, first_fast
from helpers.refusals import refused
from helpers.walks import by_type, replayed

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import lowered, noise_of
from diffusion_lab.diffusion.sampler import (
    DEIS,
    Ancestral,
    AncestralDPMSolver,
    AnnealedLangevin,
    DPMSolver,
    Euler,
    Heun,
    PredictorCorrector,
    Restart,
    ReverseSDE,
)
from diffusion_lab.diffusion.sampler.time_grid import Karras, UniformGrid, UniformLogSNR
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, SubVP, VarianceExploding

SCHEDULES = [Rectified(), Cosine(), VarianceExploding()]
every_schedule = by_type("schedule", SCHEDULES)
WEIGHTS, STD = [0.6, 0.3, 0.1], 0.5
MODES = torch.tensor([[-2.0, 0.0], [1.0, 2.0], [2.0, -1.5]], dtype=torch.float64)
MIXTURE = GaussianMixture(WEIGHTS, MODES.tolist(), STD)
POINT = GaussianMixture([1.0], [0.0], STD)
# Langevin steps at one level mix modes slowly: many are needed, and no noisier start than needed
SLOW = partial(AnnealedLangevin, 50, UniformLogSNR(0.05, 10.0), corrections=20, step_size=0.5)


SAMPLERS = {
    # DDPM's stds are still 3 to 6 % off at 100 steps and eta = 1, as the chain tests below show
    "ddim_half": Ancestral(100, UniformGrid(), eta=0.5),
    "ddpm": Ancestral(400, UniformGrid()),
    "ddpm_large": Ancestral(400, UniformGrid(), variance="fixed_large"),
    "ddpm_learned": Ancestral(400, UniformGrid(), variance="learned"),
    "dpm_half": DPMSolver(200, UniformGrid(), eta=0.5),
    "dpm_sde": DPMSolver(200, UniformGrid(), eta=1.0),
    "reverse_sde": ReverseSDE(250, UniformLogSNR()),
    "reverse_half": ReverseSDE(250, UniformLogSNR(), eta=0.5),
    "churn": Heun(100, Karras(), churn=40.0, churn_min=0.05, churn_max=50.0, noise_scale=1.003),
    "dpm_2s_ancestral": AncestralDPMSolver(100, UniformLogSNR()),
    "dpm_2s_half": AncestralDPMSolver(100, UniformLogSNR(), eta=0.5),
    "restart": Restart(40, Karras(), [(1.0, 3.0, 4, 3), (0.06, 0.3, 3, 3)]),
    "annealed_langevin": SLOW(),
    "predictor_corrector": PredictorCorrector(200, UniformLogSNR(), corrector="annealed"),
    "predictor_corrector_small": PredictorCorrector(
        400, UniformGrid(), corrector="annealed", variance="fixed_small"
    ),
}


# others of their kind are fast tests
VARIANTS = {
    *("ddim_half", "ddpm_large", "ddpm_learned", "dpm_half", "reverse_half"),
    *("dpm_2s_ancestral", "dpm_2s_half", "annealed_langevin"),
    *("predictor_corrector", "predictor_corrector_small"),
}
PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=pytest.mark.slow)
    if pair.id.split("-")[0] in VARIANTS
    else pair
    for pair in each_once(SAMPLERS, {type(s).__name__: s for s in SCHEDULES})
]


@pytest.mark.long
@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
def test_an_unbalanced_mixture_is_recovered(sampler, schedule):
    torch.manual_seed(0)

    def denoise(x, level):  # with a learned variance half way between the logs of both fixed ones
        x0 = MIXTURE.denoise(x, level).x0
        return Estimate(x0, torch.full_like(x0, 0.5))

    x = sampler(denoise, torch.randn(20_000, 2, dtype=torch.float64), schedule)
    nearest = torch.cdist(x, MODES).argmin(1)
    for mode, weight in enumerate(WEIGHTS):
        members = x[nearest == mode]
        assert len(members) / 20_000 == pytest.approx(weight, abs=0.02)
        torch.testing.assert_close(members.mean(0), MODES[mode], atol=0.05, rtol=0)
        # the std of the last mode is known to 1.1 % from its 2,000 samples
        assert members.std(0).mean().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.long
@pytest.mark.parametrize("schedule", first_fast(SCHEDULES), ids=lambda s: type(s).__name__)
def test_the_langevin_corrector_recovers_an_unbalanced_mixture(schedule):
    # In 64 dimensions a sample's norms are near their mean. What bias of 1 / D and snr^2 is left,
    # 2 % here and 4 % at snr = 0.16, partly cancels that of 60 steps with the small variance.
    torch.manual_seed(0)
    modes = torch.zeros(3, 64, dtype=torch.float64)
    modes[:, :2] = MODES
    sampler = PredictorCorrector(60, UniformLogSNR(), snr=0.1, variance="fixed_small")
    noise = torch.randn(4000, 64, dtype=torch.float64)
    x = sampler(GaussianMixture(WEIGHTS, modes.tolist(), STD).denoise, noise, schedule)
    nearest = torch.cdist(x, modes).argmin(1)
    for mode, weight in enumerate(WEIGHTS):
        members = x[nearest == mode]
        assert len(members) / 4000 == pytest.approx(weight, abs=0.02)
        assert (members.mean(0) - modes[mode]).square().mean().sqrt() < 0.05
        assert members.std(0).mean().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_chain_of_a_gaussian_has_its_known_variance(variance, steps):
    torch.manual_seed(0)
    schedule, noise = DDPMLinear(), torch.randn(20_000, 1, dtype=torch.float64)
    x = Ancestral(steps, UniformGrid(), 1.0, variance)(POINT.denoise, noise, schedule)

    # DDPM's own formulas, in alpha_bar and beta of the shortened chain
    alpha_bar = [level.alpha.item() ** 2 for level in UniformGrid()(schedule, steps)]
    known = 1 - alpha_bar[0]
    for now, before in pairwise(alpha_bar):
        beta = 1 - now / before
        gain = math.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)  # gain of x0_hat in x
        slope = math.sqrt(before) * beta / (1 - now) * gain
        slope += math.sqrt(1 - beta) * (1 - before) / (1 - now)
        added = beta if variance == "fixed_large" else beta * (1 - before) / (1 - now)
        known = slope**2 * known + (added if before < 1 else 0)
    assert x.var().item() == pytest.approx(known, rel=0.04)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
@every_schedule
def test_sde_steps_of_any_length_leave_the_noise_of_their_level(schedule, eta):
    """Also after steps from pure noise, of all lengths: the noise is of variance sigma^2."""
    torch.manual_seed(0)
    x0 = torch.full((100_000, 1), 0.7, dtype=torch.float64)
    for steps in (3, 10, 20):
        levels = UniformLogSNR()(schedule, steps)
        noise = levels[0].sigma * torch.randn_like(x0)
        walk = ReverseSDE(steps, UniformLogSNR(), eta).walk(
            lambda x, level: Estimate(x0), noise, levels, schedule, torch.randn_like
        )
        for state, level in zip(walk, levels[1:-1], strict=False):
            eps = noise_of(state, x0, level)
            assert eps.mean().item() == pytest.approx(0, abs=0.015)
            assert eps.var().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
def test_sde_steps_are_those_of_k_diffusion(eta):
    """Compares with the first-order rule of k-diffusion's SDE solvers, whose eta is eta^2 here."""
    schedule, steps = VarianceExploding(), 12
    grid = UniformLogSNR(0.05, 10.0)
    levels = grid(schedule, steps)
    start = torch.randn(6, 2, dtype=torch.float64)
    draws = torch.randn(steps, 6, 2, dtype=torch.float64)
    denoise, fresh = MIXTURE.denoise, replayed(draws)
    x = levels[0].sigma * start
    walk = ReverseSDE(steps, grid, eta).walk(denoise, x, levels, schedule, replayed(draws))
    for state, (here, there) in zip(walk, pairwise(levels), strict=True):
        x0 = denoise(x, here).x0
        if there.sigma == 0:
            x = x0
        else:
            h = (here.sigma / there.sigma).log()
            x = there.sigma / here.sigma * (-(eta**2) * h).exp() * x
            x = x - torch.expm1(-h - eta**2 * h) * x0
            x = x + there.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt() * fresh()
        torch.testing.assert_close(state, x, atol=1e-9, rtol=0)


@every_schedule
def test_sde_steps_are_eulers_without_noise_and_ddpms_at_eta_1(schedule):
    noise, *draws = torch.randn(8, 6, 2, dtype=torch.float64)
    for eta, other in ((0.0, Euler(7, UniformGrid())), (1.0, Ancestral(7, UniformGrid()))):
        ends = (
            sampler(MIXTURE.denoise, noise, schedule, replayed(draws))
            for sampler in (ReverseSDE(7, UniformGrid(), eta), other)
        )
        torch.testing.assert_close(*ends, atol=1e-9, rtol=0)


def frechet_to_mixture(x):
    """The Frechet distance of points (n, 2) to the mixture's own mean and covariance."""
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    mean = weights @ MODES
    cov = (MODES.T * weights) @ MODES - mean[:, None] * mean + STD**2 * torch.eye(2).double()
    own = x.T.cov()
    overlap = torch.linalg.eigvals(own @ cov).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - mean).square().sum() + (own + cov).trace() - 2 * overlap).item()


GRIDS = [UniformLogSNR(), UniformGrid(), Karras()]
FAST = [(schedule, UniformLogSNR, 1.0) for schedule in SCHEDULES[:2]]
FALLING = [
    pytest.param(
        schedule,
        grid,
        eta,
        id=f"{type(schedule).__name__}-{type(grid).__name__}-{eta}",
        marks=[] if (schedule, type(grid), eta) in FAST else pytest.mark.slow,
    )
    for schedule in [*SCHEDULES, DDPMLinear(), SubVP()]
    for grid in GRIDS
    for eta in (0.5, 1.0, 1.5)
]


@pytest.mark.long
@pytest.mark.parametrize(("schedule", "grid", "eta"), FALLING)
def test_points_of_the_reverse_sde_come_nearer_to_the_data_with_every_more_steps(
    schedule, grid, eta
):
    distances = []
    for steps in (5, 10, 20, 40):
        torch.manual_seed(0)
        noise = torch.randn(20_000, 2, dtype=torch.float64)
        x = ReverseSDE(steps, grid, eta)(MIXTURE.denoise, noise, schedule)
        distances.append(frechet_to_mixture(x))
    for few, more in pairwise(distances):
        assert more < 0.6 * few  # a quarter in the limit: the error's square, of first order
    assert distances[-1] < 0.08


def test_learned_variance_lies_between_the_logs_of_the_fixed_ones():
    schedule, x = DDPMLinear(), torch.zeros(5, 1, dtype=torch.float64)
    levels = schedule(torch.tensor([0.6, 0.5], dtype=torch.float64))
    _, small, large = lowered(levels[0], levels[1], 0.8)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.3], dtype=torch.float64)[:, None]
    sampler = Ancestral(1, UniformGrid(), 0.8, "learned")
    (state,) = sampler.walk(lambda x, level: Estimate(x, share), x, levels, None, torch.ones_like)
    expected = (share * large.log() + (1 - share) * small.log()).exp().sqrt()
    torch.testing.assert_close(state, expected, atol=0, rtol=1e-12)


@pytest.mark.parametrize("sampler", [Ancestral, PredictorCorrector])
def test_learned_variance_needs_a_model_that_learned_it(sampler):
    with refused("variance=learned", by=ValueError):
        sampler(3, UniformGrid(), variance="learned")(POINT.denoise, torch.randn(2, 1), Cosine())


def test_no_noise_is_drawn_where_none_is_wanted():
    noise = torch.randn(4, 1)
    for sampler in (
        Heun(5, UniformGrid()),
        Heun(5, UniformGrid(), churn=9.0, churn_max=1e-4),
        Ancestral(5, UniformGrid(), eta=0.0, variance="fixed_large"),
        DPMSolver(5, UniformGrid()),
        DEIS(5, UniformGrid()),
        AncestralDPMSolver(5, UniformGrid(), eta=0.0),
        Restart(5, UniformGrid(), []),
        ReverseSDE(5, UniformGrid(), eta=0.0),
    ):
        assert sampler(POINT.denoise, noise, Cosine(), randn_like=None).isfinite().all()


@every_schedule
def test_churn_raises_the_level_and_stops_at_the_noisiest(schedule):
    """The network is called at sigma / alpha times 1 + min(churn / steps, sqrt(2) - 1)."""
    for churn, gamma in ((1.0, 0.1), (50.0, math.sqrt(2) - 1)):
        asked = []

        def denoise(x, level, asked=asked):
            asked.append((level.sigma / level.alpha).item())
            return Estimate(torch.zeros_like(x))

        Heun(10, UniformGrid(), churn=churn)(denoise, torch.randn(2, 1), schedule)
        levels = UniformGrid()(schedule, 10)
        ratio, noisiest = levels.sigma / levels.alpha, schedule(torch.tensor(1.0))
        expected = (ratio[:-1] * (1 + gamma)).clamp(max=noisiest.sigma / noisiest.alpha)
        assert asked[::2] == pytest.approx(expected.tolist(), rel=1e-9)


def test_ncsn_defaults_keep_the_noise_of_a_level():
    """No other step size leaves less excess noise: NCSNv2's technique 3 (arXiv:2006.09011)."""
    steps = AnnealedLangevin(232, UniformGrid())
    gamma = (50 / 0.01) ** (1 / (steps.steps - 1))

    def excess(size):
        kept = (1 - size) ** (2 * steps.corrections)
        fresh = 2 * size / (1 - (1 - size) ** 2)
        return abs(kept * (gamma**2 - fresh) + fresh - 1)

    sizes = [0.002 * i for i in range(1, 100)]
    assert steps.step_size == pytest.approx(6.2e-6 / 0.01**2)
    assert min(sizes, key=excess) == pytest.approx(steps.step_size, abs=0.005)


@pytest.mark.parametrize("corrector", ["langevin", "annealed"])
@pytest.mark.parametrize("t", [1.0, 0.6])
def test_a_correction_is_shorter_by_the_beta_of_its_step(t, corrector):
    """Compares with score-SDE's variance-preserving correctors, where e has the factor 1 - beta.

    On pure noise this factor is 0: x stays the same.
    """
    levels = Rectified()(torch.tensor([t, 0.5], dtype=torch.float64))
    seen, (x, z) = [], torch.randn(2, 6, 2, dtype=torch.float64)

    def denoise(x, level):
        seen.append(x)
        return Estimate(0.3 * x)

    sampler = PredictorCorrector(1, UniformGrid(), corrector=corrector)
    list(sampler.walk(denoise, x, levels, None, lambda x: z))

    alpha, sigma = levels[0].alpha, levels[0].sigma
    score = (0.3 * alpha * x - x) / sigma**2
    e = 2 * (1 - t) ** 2 / 0.5**2 * (0.16 * sigma) ** 2
    if corrector == "langevin":
        e = e / sigma**2 * (z.norm(dim=1) / score.norm(dim=1))[:, None] ** 2
    torch.testing.assert_close(seen[1], x + e * score + (2 * e).sqrt() * z, atol=1e-12, rtol=0)
