"""Schedules: published values, exact ends, and the way back from logSNR."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from helpers.compositions import composed
from helpers.exact_denoiser import GaussianMixture
from helpers.refusals import refused
from helpers.walks import by_type
from hydra.utils import instantiate
from test_multistep import errors_of

from diffusion_lab.diffusion.noise import noise_of
from diffusion_lab.diffusion.objective import Flow, V
from diffusion_lab.diffusion.sampler import Euler, Heun
from diffusion_lab.diffusion.sampler.time_grid import Quadratic, Trailing, UniformGrid
from diffusion_lab.diffusion.schedule import (
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    Linear,
    NoiseSchedule,
    Rectified,
    Shifted,
    Sigmoid,
    SubVP,
    VarianceExploding,
    ZeroTerminalSNR,
)

PRESERVING = [
    Cosine(),
    Cosine(0.008),
    Linear(),
    Sigmoid(),
    Sigmoid(0, 3, 0.3),
    DDPMLinear(),
    DDPMLinear(21),
    DDPMScaledLinear(),
    DDPMCosine(),
    Linear(0.1, 100),  # reaches logSNR -50
    DDPMLinear(1000, 1e-4, 0.1),
    ZeroTerminalSNR(DDPMLinear()),
    ZeroTerminalSNR(DDPMLinear(341)),  # inverting alpha = 0 would round to below 1
    ZeroTerminalSNR(Cosine()),
    Shifted(Linear(), 3),
]
SCHEDULES = [
    *PRESERVING,
    Rectified(),
    VarianceExploding(),
    VarianceExploding(0.01, 50),
    SubVP(),
    Shifted(Rectified(), 3),
    Shifted(Rectified(), 0.3),
    Shifted(VarianceExploding(), 3),
    Shifted(ZeroTerminalSNR(DDPMScaledLinear()), 2),
]
each = by_type("schedule", SCHEDULES)


def at(schedule, t):
    level = schedule(torch.tensor(t, dtype=torch.float64))
    return level.alpha.item(), level.sigma.item()


def ends(schedule):
    return schedule(torch.tensor([0.0, 1.0]))


def assert_same(ours, theirs, atol, rtol=0.0):
    torch.testing.assert_close(ours, theirs.double(), atol=atol, rtol=rtol)


def inside(n=101):
    return torch.linspace(0.002, 0.998, n, dtype=torch.float64)


def test_rectified_is_the_straight_path_with_exact_ends():
    assert at(Rectified(), 0.0) == (1, 0)
    assert at(Rectified(), 0.25) == (0.75, 0.25)
    assert at(Rectified(), 1.0) == (0, 1)


def test_cosine_walks_the_circle_between_logsnr_20_and_minus_20():
    ends = Cosine()(torch.tensor([0.0, 0.5, 1.0]))
    assert ends.logsnr.tolist() == pytest.approx([20, 0, -20], abs=1e-9)
    t = torch.linspace(0, 1, 101)
    level = Cosine()(t)
    angle = torch.atan2(level.sigma, level.alpha)
    assert torch.allclose(angle.diff(), angle.diff()[:1])  # constant speed
    assert (angle - t.double() * math.pi / 2).abs().max() < 5e-5  # and almost the plain cosine


def test_cosine_without_offset_is_cos_and_sin_to_the_last_bit():
    start = math.atan(math.exp(-10))
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    angle = start + (math.pi / 2 - 2 * start) * t
    assert torch.equal(Cosine()(t).alpha, angle.cos())
    assert torch.equal(Cosine()(t).sigma, angle.sin())


def test_cosine_with_offset_is_improved_ddpms_formula():
    t = inside()
    # mapping t linearly onto the ends moves alpha^2 by less than 1e-4 from the published one
    start = 0.008 / 1.008 * math.pi / 2
    published = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(start) ** 2
    level = Cosine(0.008)(t)
    assert_same(level.alpha**2, published, atol=1e-4)
    assert ends(Cosine(0.008)).logsnr.tolist() == pytest.approx([20, -20], abs=1e-9)
    # the offset makes small t noisier: its angle is 0.0125
    assert at(Cosine(0.008), 0.01)[1] > 1.5 * at(Cosine(), 0.01)[1]
    # sigma^2 keeps its digits where 1 - alpha^2 has lost them: over 1e-13 it is a straight line
    low = Cosine(0.008)(torch.tensor([0.0, 1e-13, 2e-13], dtype=torch.float64))
    slope = (low.sigma**2).diff() / 1e-13
    expected = math.pi / 1.008 * math.sin(start) / math.cos(start)
    assert slope.tolist() == pytest.approx([expected, expected], rel=2e-4)


def test_linear_is_the_integral_of_beta():
    grid = torch.linspace(0, 0.3, 100001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + 19.9 * grid, grid).item()
    alpha, sigma = at(Linear(), 0.3)
    assert alpha == pytest.approx(math.exp(-integral / 2), rel=1e-9)
    assert sigma == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-9)
    assert at(Linear(), 0.0) == (1, 0)
    assert at(Linear(), 1.0)[0] == pytest.approx(math.exp(-20.1 / 4), rel=1e-12)  # 0.00657
    # sigma^2 = 0.1 t near t = 0, where 1 - alpha^2 has no digit left
    assert at(Linear(), 1e-17)[1] == pytest.approx(1e-9, rel=1e-9)


def test_sub_vp_has_the_square_of_linears_sigma():
    t = inside()
    assert_same(SubVP()(t).alpha, Linear()(t).alpha, atol=0)
    assert_same(SubVP()(t).sigma, Linear()(t).sigma ** 2, atol=0, rtol=1e-13)
    assert at(SubVP(), 0.0) == (1, 0)
    assert at(SubVP(), 1e-17)[1] == pytest.approx(1e-18, rel=1e-9)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1), (0, 3, 0.3), (-3, 3, 1.1)])
def test_sigmoid_is_the_published_formula(start, end, tau):
    t = inside()
    low, high = (torch.tensor(x / tau).double().sigmoid() for x in (start, end))
    # mapping t linearly onto the ends moves t by less than 3e-6
    published = (high - ((start + t * (end - start)) / tau).sigmoid()) / (high - low)
    schedule = Sigmoid(start, end, tau)
    assert_same(schedule(t).alpha ** 2, published, atol=1e-5)
    assert ends(schedule).logsnr.tolist() == pytest.approx([20, -20], abs=1e-12)
    assert at(Sigmoid(), 0.3) == at(Sigmoid(-3.0, 3.0, 1.0), 0.3)  # the published default


def test_variance_exploding_is_geometric_between_its_ends():
    schedule = VarianceExploding(0.002, 80)
    assert at(schedule, 0.0) == pytest.approx((1, 0.002), rel=1e-12)
    assert at(schedule, 0.5) == pytest.approx((1, 0.4), rel=1e-12)  # sqrt(0.002 * 80)
    assert at(schedule, 1.0) == pytest.approx((1, 80), rel=1e-12)


def test_ddpm_tables_published_ends():
    alpha, sigma = at(DDPMLinear(), 1.0)
    assert alpha**2 == pytest.approx(4.0358e-5, rel=1e-4)
    assert sigma / alpha == pytest.approx(157.4, abs=0.05)
    alpha, sigma = at(DDPMScaledLinear(), 1.0)  # Stable Diffusion's sigma_max and sigma_min
    assert sigma / alpha == pytest.approx(14.6146, abs=1e-3)
    alpha, sigma = at(DDPMScaledLinear(), 0.001)
    assert sigma / alpha == pytest.approx(0.0292, abs=1e-4)
    assert at(DDPMCosine(), 1.0)[0] == pytest.approx(4.928e-5, rel=1e-3)
    assert at(DDPMCosine(max_beta=0.5), 1.0)[0] > 1e-3  # only the cap leaves some signal


@pytest.mark.parametrize("steps", [100, 250, 4000])
def test_tables_of_any_length_end_at_about_the_same_noise(steps):
    for table in (DDPMLinear, DDPMScaledLinear):
        same = ends(table()).logsnr[1].item()
        assert ends(table(steps)).logsnr[1].item() == pytest.approx(same, abs=0.8)
    # the cosine is not scaled: a point's level depends on t alone, until the betas are capped
    t = torch.arange(1, 10, dtype=torch.float64) / 10
    short, long = DDPMCosine(steps)(t), DDPMCosine()(t)
    assert_same(short.alpha, long.alpha, atol=1e-12, rtol=1e-12)


def test_ddpm_linear_between_the_points_of_its_table():
    schedule = DDPMLinear(100)
    below, between, above = (at(schedule, t)[0] for t in (0.3, 0.305, 0.31))
    assert between == pytest.approx(math.sqrt(below * above), rel=1e-12)  # log alpha linear
    assert at(schedule, 0.0) == (1, 0)
    # sigma keeps its digits, which 1 - alpha^2 would lose
    small = at(DDPMLinear(), 1e-12)[1]
    assert small == pytest.approx(math.sqrt(-math.expm1(1e-9 * math.log1p(-1e-4))), rel=1e-9)


@pytest.mark.parametrize("inner", [DDPMLinear(), DDPMScaledLinear(), Linear(), Cosine(0.008)])
def test_zero_terminal_snr_moves_alpha_to_exactly_zero(inner):
    schedule = ZeroTerminalSNR(inner)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    level, before = schedule(t), inner(t)
    assert (level.alpha[-1], level.sigma[-1]) == (0, 1)
    assert at(schedule, 1.0) == (0, 1)
    assert schedule.discrete_steps == inner.discrete_steps
    last = before.alpha[-1]
    torch.testing.assert_close(level.alpha, (before.alpha - last) / (1 - last))
    # as exact as the inner schedule near clean data: sigma'^2 is sigma^2 / (1 - alpha(1))
    low = torch.tensor(1e-12, dtype=torch.float64)
    if inner(torch.zeros(())).sigma == 0:
        ratio = (schedule(low).sigma / inner(low).sigma) ** 2
        assert ratio.item() == pytest.approx(1 / (1 - last.item()), rel=1e-9)


@pytest.mark.parametrize(
    ("inner", "path"),
    [
        (Rectified(), lambda alpha, sigma: alpha + sigma),
        (Cosine(), lambda alpha, sigma: alpha**2 + sigma**2),
        (ZeroTerminalSNR(DDPMLinear()), lambda alpha, sigma: alpha**2 + sigma**2),
        (VarianceExploding(), lambda alpha, sigma: alpha),
    ],
)
@pytest.mark.parametrize("shift", [4.0, 0.25])
def test_shifted_lowers_logsnr_everywhere_and_stays_on_the_path(inner, path, shift):
    t, schedule = inside(), Shifted(inner, shift)
    level = schedule(t)
    expected = inner(t).logsnr - 2 * math.log(shift)
    assert_same(level.logsnr, expected, atol=1e-12)
    length = path(level.alpha, level.sigma)
    assert_same(length, torch.ones_like(t), atol=1e-14)
    assert schedule.discrete_steps == inner.discrete_steps
    assert (ends(schedule).alpha[1] == 0) == (ends(inner).alpha[1] == 0)


@by_type("schedule", PRESERVING)
def test_variance_is_preserved(schedule):
    level = schedule(torch.linspace(0, 1, 101))
    one = torch.ones(101, dtype=torch.float64)
    assert_same(level.alpha**2 + level.sigma**2, one, atol=1e-14)


@each
def test_levels_are_float64_keep_the_shape_and_fall_in_logsnr(schedule):
    level = schedule(torch.linspace(0, 1, 300, dtype=torch.float32).reshape(3, 100))
    assert level.t.dtype == level.alpha.dtype == level.sigma.dtype == torch.float64
    assert level.alpha.shape == level.sigma.shape == (3, 100)
    assert (level.logsnr.flatten().diff() < 0).all()


@each
def test_heun_has_order_two_and_ends_where_the_ode_does(schedule):
    errors = errors_of(Heun, schedule, [40, 160])
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(2, abs=0.15)
    assert errors[1] < 2e-3


@each
def test_at_logsnr_goes_back(schedule):
    t = inside(250)
    level = schedule.at_logsnr(schedule(t).logsnr)
    assert_same(level.t, t, atol=1e-12)
    assert torch.equal(level.alpha, schedule(level.t).alpha)
    for shape in ((), (2, 3)):
        assert schedule.at_logsnr(torch.zeros(shape)).t.shape == shape
    logsnr = torch.tensor([19.0, 15.0, -8.0, -19.0], dtype=torch.float64)
    low, high = ends(schedule).logsnr.flip(0)
    logsnr = logsnr[(low < logsnr) & (logsnr < high)]
    # one rounding of t near 1 moves logSNR by up to 2^-53 / alpha^2, 2e-8 at -19
    assert_same(schedule.at_logsnr(logsnr).logsnr, logsnr, atol=2e-8)


@each
def test_closed_forms_agree_with_bisection(schedule):
    assert type(schedule).at_logsnr is not NoiseSchedule.at_logsnr
    logsnr = torch.linspace(-15, 15, 61, dtype=torch.float64)
    closed, bisected = schedule.at_logsnr(logsnr), NoiseSchedule.at_logsnr(schedule, logsnr)
    assert_same(closed.t, bisected.t, atol=1e-12, rtol=1e-9)
    assert_same(closed.sigma, bisected.sigma, atol=1e-12, rtol=1e-9)


@each
def test_at_logsnr_beyond_the_ends_is_the_end(schedule):
    t = schedule.at_logsnr(torch.tensor([-math.inf, -100.0, 100.0, math.inf])).t
    assert t[0] == 1
    assert t[1] == pytest.approx(1, abs=1e-15)
    assert t[2] == pytest.approx(0, abs=1e-15)
    assert t[3] == 0


@pytest.mark.parametrize("beta_end", [0.001, 0.012, 0.02, 0.029, 0.0195, 0.115, 0.999])
def test_the_shortest_table_that_the_refusal_names_works(beta_end):
    for table in (DDPMLinear, DDPMScaledLinear):
        fewest = math.floor(round(1000 * beta_end, 6)) + 1
        logsnr = table(fewest, 1e-4, beta_end)(torch.linspace(0, 1, 50)).logsnr
        assert (logsnr.diff() < 0).all()
        with refused(f"steps={fewest - 1}", f"use {fewest}", by=ValueError):
            table(fewest - 1, 1e-4, beta_end)


@pytest.mark.parametrize(
    ("overrides", "outer", "inner"),
    [
        (["=zero_terminal_snr"], ZeroTerminalSNR, DDPMLinear),
        (["=zero_terminal_snr", ".schedule.steps=50"], ZeroTerminalSNR, DDPMLinear),
        (["=zero_terminal_snr", "@schedule.schedule=cosine"], ZeroTerminalSNR, Cosine),
        (["=shifted"], Shifted, Rectified),
        (["=shifted", "@schedule.schedule=zero_terminal_snr"], Shifted, ZeroTerminalSNR),
    ],
)
def test_the_inner_schedule_is_chosen_as_the_configuration_says(overrides, outer, inner):
    overrides = [f"schedule{override}" for override in overrides]
    schedule = instantiate(composed("train", "name=x", *overrides).schedule)
    assert isinstance(schedule, outer)
    assert isinstance(schedule.schedule, inner)
    assert schedule.discrete_steps == schedule.schedule.discrete_steps


SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
MIXTURE = GaussianMixture([0.6, 0.3, 0.1], [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.2)


def points(schedule):
    """Returns our levels at the points of a table."""
    steps = schedule.discrete_steps
    return schedule(torch.arange(1, steps + 1, dtype=torch.float64) / steps)


def betas_of(schedule):
    alpha_bar = torch.cat([torch.ones(1).double(), points(schedule).alpha ** 2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (DDPMLinear(), {"beta_schedule": "linear"}),
        (DDPMLinear(1000, 0.001, 0.01), {"beta_start": 0.001, "beta_end": 0.01}),
        (DDPMScaledLinear(), SCALED_LINEAR),
        (
            DDPMScaledLinear(1000, 0.0015, 0.0195),
            SCALED_LINEAR | {"beta_start": 0.0015, "beta_end": 0.0195},
        ),
        (DDPMCosine(), COSINE),
        (DDPMCosine(50), COSINE | {"num_train_timesteps": 50}),  # not scaled
        # diffusers leaves the scaling by 1000 / N to its user
        (DDPMLinear(4000), {"beta_start": 2.5e-5, "beta_end": 0.005, "num_train_timesteps": 4000}),
    ],
)
def test_tables(schedule, table):
    """Compares alpha^2 with DDPMScheduler.alphas_cumprod, float32, at t = (i + 1) / N."""
    scheduler = DDPMScheduler(**table)
    assert_same(points(schedule).alpha ** 2, scheduler.alphas_cumprod, atol=2e-6)


@pytest.mark.parametrize("steps", [1000, 100, 7])
@pytest.mark.parametrize("max_beta", [0.999, 0.5])
def test_cosine_betas(steps, max_beta):
    """Compares the betas between our points with betas_for_alpha_bar, "cosine", and its cap."""
    betas = betas_of(DDPMCosine(steps, 0.008, max_beta))
    assert_same(betas, betas_for_alpha_bar(steps, max_beta), atol=1e-7)


def test_the_continuous_cosine_is_its_table():
    """Compares Cosine(0.008) with DDPMScheduler's squaredcos_cap_v2, not at the capped end."""
    t, scheduler = points(DDPMCosine()).t, DDPMScheduler(**COSINE)
    assert_same(Cosine(0.008)(t).alpha[:-1], scheduler.alphas_cumprod.sqrt()[:-1], atol=5e-5)


@pytest.mark.parametrize("inner", [DDPMLinear(), DDPMScaledLinear(), DDPMCosine()])
def test_zero_terminal_snr(inner):
    """Compares alpha with rescale_zero_terminal_snr, run on the same table in float64.

    It keeps the alpha of index 0 where ours keeps clean data's, at t = 0: they differ by at most
    alpha(1) (1 - alpha(1/N)), 3e-7 for DDPM's table and 3e-5 for Stable Diffusion's.
    """
    alpha = (1 - rescale_zero_terminal_snr(betas_of(inner))).cumprod(0).sqrt()
    first, last = points(inner).alpha[[0, -1]].tolist()
    level = points(ZeroTerminalSNR(inner))
    assert_same(level.alpha, alpha, atol=1.2 * last * (1 - first) + 1e-9)
    assert level.alpha[-1] == alpha[-1] == 0
    # anchored at index 0, as diffusers' is, ours is the same
    anchored = (points(inner).alpha - last) * first / (first - last)
    assert_same(anchored, alpha, atol=1e-9)


@pytest.mark.parametrize("shift", [3.0, 1.5, 0.5])
def test_shifted_flow(shift):
    """Compares sigmas with FlowMatchEulerDiscreteScheduler's, shifted from given ones."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist())
    levels = UniformGrid()(Shifted(Rectified(), shift), 20)
    assert_same(levels.sigma, scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "grid", "prediction", "scheduler", "sigmas"),
    [
        (
            ZeroTerminalSNR(DDPMLinear()),
            Trailing(),
            V(),
            DDIMScheduler(
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                prediction_type="v_prediction",
                clip_sample=False,
            ),
            {"num_inference_steps": 25},
        ),
        (
            Shifted(Rectified(), 3.0),
            UniformGrid(),
            Flow(),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            {"sigmas": np.linspace(1, 1 / 25, 25).tolist()},
        ),
    ],
)
def test_samples(schedule, grid, prediction, scheduler, sigmas):
    """Compares with DDIMScheduler (zero terminal SNR), FlowMatchEulerDiscreteScheduler (a shift).

    25 steps lead from pure noise, with the exact denoiser of a mixture as a network of v or of flow
    (where steps do not divide 1000, DDIMScheduler steps to levels other than its next timestep).
    """
    scheduler.set_timesteps(**sigmas)
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels, theirs = grid(schedule, 25), noise
    for t, level in zip(scheduler.timesteps, levels[:-1], strict=True):
        x0 = MIXTURE.denoise(theirs, level).x0
        output = prediction.target(x0, noise_of(theirs, x0, level), level)
        theirs = scheduler.step(output, t, theirs).prev_sample
    assert_same(Euler(25, grid)(MIXTURE.denoise, noise, schedule), theirs, atol=1e-5)


def test_trailing():
    """Compares with DDIMScheduler's trailing spacing: all numbers of timesteps from 1 to 1000.

    The table has N = 1000 points. Where numpy's arange yields one point too many, a timestep of -1,
    it is left out.
    """
    scheduler, surplus = DDIMScheduler(timestep_spacing="trailing"), 0
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        index = (1000 * Trailing().times(DDPMLinear(), steps) - 1).round().long()
        assert index.tolist() == scheduler.timesteps[:steps].tolist()
        assert scheduler.timesteps[steps:].tolist() in ([], [-1])
        surplus += len(scheduler.timesteps) - steps
    assert surplus > 0  # fails once diffusers has fixed this


@pytest.mark.parametrize("points", [1000, 100, 500])
def test_quadratic(points):
    """Compares with DDIM's own code: np.linspace(0, np.sqrt(0.8 N), steps) ** 2, each by int()."""
    schedule = DDPMCosine(points)
    most = 1 + math.floor(math.sqrt(0.8 * points))
    for steps in range(2, most + 1):
        published = [int(s) for s in np.linspace(0, np.sqrt(points * 0.8), steps) ** 2]
        index = (points * Quadratic().times(schedule, steps) - 1).round().long()
        assert index.tolist() == published[::-1]
        assert len(set(published)) == steps
    # in longer grids DDIM's code repeats its cleanest points, and ours takes their neighbours
    index = (points * Quadratic().times(schedule, most + 1) - 1).round().flip(0)
    published = [int(s) for s in np.linspace(0, np.sqrt(points * 0.8), most + 1) ** 2]
    assert len(set(published)) == most
    assert np.abs(np.array(published) - index.numpy()).max() == 1
