"""Our tables and time grids against diffusers'; each docstring names the counterpart."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from helpers.exact_denoiser import GaussianMixture

from diffusion_lab.diffusion.noise import noise_of
from diffusion_lab.diffusion.objective import Flow, V
from diffusion_lab.diffusion.sampler import Euler
from diffusion_lab.diffusion.sampler.time_grid import Quadratic, Trailing, UniformGrid
from diffusion_lab.diffusion.schedule import (
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    Rectified,
    Shifted,
    ZeroTerminalSNR,
)

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


MIXTURE = GaussianMixture([0.6, 0.3, 0.1], [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.2)


def points(schedule):
    """Returns our levels at the points of a table."""
    steps = schedule.discrete_steps
    return schedule(torch.arange(1, steps + 1, dtype=torch.float64) / steps)


def assert_same(ours, theirs, atol, rtol=0.0):
    torch.testing.assert_close(ours, theirs.double(), atol=atol, rtol=rtol)


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (DDPMLinear(), {"beta_schedule": "linear"}),
        (DDPMLinear(1000, 0.001, 0.01), {"beta_start": 0.001, "beta_end": 0.01}),
        (DDPMScaledLinear(), SCALED_LINEAR),
        (
            DDPMScaledLinear(1000, 0.0015, 0.0195),
            {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        ),
        (DDPMCosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            DDPMCosine(50),  # not scaled
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        ),
        (
            DDPMLinear(4000),  # diffusers leaves the scaling by 1000 / N to its user
            {"beta_start": 2.5e-5, "beta_end": 0.005, "num_train_timesteps": 4000},
        ),
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
    alpha2 = torch.cat(
        [torch.ones(1).double(), points(DDPMCosine(steps, 0.008, max_beta)).alpha ** 2]
    )
    betas = 1 - alpha2[1:] / alpha2[:-1]
    assert_same(betas, betas_for_alpha_bar(steps, max_beta), atol=1e-7)


def test_the_continuous_cosine_is_its_table():
    """Compares Cosine(0.008) with DDPMScheduler's squaredcos_cap_v2, not at the capped end."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert_same(Cosine(0.008)(t).alpha[:-1], scheduler.alphas_cumprod.sqrt()[:-1], atol=5e-5)


@pytest.mark.parametrize("inner", [DDPMLinear(), DDPMScaledLinear(), DDPMCosine()])
def test_zero_terminal_snr(inner):
    """Compares alpha with rescale_zero_terminal_snr, run on the same table in float64.

    It keeps the alpha of index 0 where ours keeps clean data's, at t = 0: they differ by at most
    alpha(1) (1 - alpha(1/N)), 3e-7 for DDPM's table and 3e-5 for Stable Diffusion's.
    """
    alpha2 = torch.cat([torch.ones(1).double(), points(inner).alpha ** 2])
    betas = rescale_zero_terminal_snr(1 - alpha2[1:] / alpha2[:-1])
    alpha = (1 - betas).cumprod(0).sqrt()
    first, last = alpha2[1].sqrt().item(), alpha2[-1].sqrt().item()
    level = points(ZeroTerminalSNR(inner))
    assert_same(level.alpha, alpha, atol=1.2 * last * (1 - first) + 1e-9)
    assert level.alpha[-1] == alpha[-1] == 0
    # anchored at index 0, as diffusers' is, ours is the same
    anchored = (points(inner).alpha - last) * first / (first - last)
    assert_same(anchored, alpha, atol=1e-9)


def test_zero_terminal_snr_of_ddpms_table():
    """Compares alpha with DDIMScheduler(rescale_betas_zero_snr=True) in float32, to 1e-6."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    level = points(ZeroTerminalSNR(DDPMLinear()))
    assert_same(level.alpha, scheduler.alphas_cumprod.sqrt(), atol=1e-6)


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
