"""Our samplers against diffusers' schedulers, with the exact denoiser of a mixture as the network.

Each test says what is compared. Both sides start from the same state and are given the same noise;
the final samples agree to 1e-5, or to 1e-9 where diffusers' float32 tables can be made float64.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from exact_denoiser import GaussianMixture

from diffusion_lab.noise import noise_of
from diffusion_lab.objective import EDM, Eps, Flow, V
from diffusion_lab.sampler import Ancestral, DPMSolver, Euler, Heun
from diffusion_lab.sampler.time_grid import Karras, Leading, Linspace, Uniform
from diffusion_lab.schedule import DDPMLinear, Rectified, VarianceExploding

MIXTURE = GaussianMixture([0.6, 0.3, 0.1], [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.2)
# final levels clean, no clipping: what our time grids and guidance do
DDPM_TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
NOISE = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def outputs(prediction):
    """What a perfect network of this prediction type says of x."""

    def network(x, level):
        x0 = MIXTURE.denoise(x, level).x0
        return prediction.target(x0, noise_of(x, x0, level), level)

    return network


def theirs(scheduler, network, x, levels, **step):
    """diffusers' loop; `levels` are ours at each of its timesteps."""
    assert len(scheduler.timesteps) == len(levels)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        extra = {name: value() if callable(value) else value for name, value in step.items()}
        x = scheduler.step(network(x, level), t, x, **extra).prev_sample
    return x


def in_float64(scheduler):
    """The same scheduler with its table of betas, and all made from it, in float64."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def assert_same(x, y, atol=1e-5):
    torch.testing.assert_close(x.double(), y.double(), atol=atol, rtol=0)


def on_table(scheduler, grid, steps, **arguments):
    """Both sides' places on the table of 1000, which must be the same."""
    schedule = DDPMLinear()
    scheduler.set_timesteps(**(arguments or {"num_inference_steps": steps}))
    levels = grid(schedule, steps)
    index = (1000 * levels.t[:-1] - 1).round()
    assert index.tolist() == scheduler.timesteps.double().tolist()
    return schedule, levels[:-1]


@pytest.mark.parametrize(
    ("grid", "spacing"), [(Uniform(), "trailing"), (Leading(), "leading"), (Linspace(), "linspace")]
)
@pytest.mark.parametrize("steps", [4, 40, 50, 250])
def test_grids_on_the_table(grid, spacing, steps):
    """The timesteps of DDIMScheduler for each spacing."""
    on_table(DDIMScheduler(**DDPM_TABLE, timestep_spacing=spacing), grid, steps)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("grid", "steps"), [(Leading(), 50), (Leading(), 1000), (Linspace(), 60)])
def test_ddpm(grid, steps, variance):
    """DDPMScheduler, eps prediction, both fixed variances, the same generator's noise.

    Its trailing spacing is left out: there it adds fixed_large noise to the final, clean sample.
    """
    scheduler = in_float64(DDPMScheduler(variance_type=variance, clip_sample=False))
    index = (1000 * grid(DDPMLinear(), steps).t[:-1] - 1).round().long().tolist()
    schedule, levels = on_table(scheduler, grid, steps, timesteps=index)
    start, generator = levels[0].sigma * NOISE, torch.Generator().manual_seed(1)
    expected = theirs(scheduler, outputs(Eps()), start, levels, generator=generator)

    generator = torch.Generator().manual_seed(1)
    x = Ancestral(steps, grid, 1.0, variance)(
        MIXTURE.denoise,
        NOISE,
        schedule,
        lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator),
    )
    assert_same(x, expected, 1e-9)


@pytest.mark.parametrize("prediction", [Eps(), V()])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("grid", "spacing"), [(Uniform(), "trailing"), (Leading(), "leading")])
def test_ddim(grid, spacing, eta, prediction):
    """DDIMScheduler with eta and given noise, eps and v prediction, set_alpha_to_one."""
    kind = "epsilon" if isinstance(prediction, Eps) else "v_prediction"
    scheduler = in_float64(
        DDIMScheduler(clip_sample=False, timestep_spacing=spacing, prediction_type=kind)
    )
    schedule, levels = on_table(scheduler, grid, 50)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(64, 2, dtype=torch.float64, generator=generator) for _ in range(50)]
    theirs_draws, ours_draws = iter(draws), iter(draws)
    x = levels[0].sigma * NOISE
    expected = theirs(
        scheduler,
        outputs(prediction),
        x,
        levels,
        eta=eta,
        variance_noise=lambda: next(theirs_draws) if eta > 0 else None,
    )
    sampler = Ancestral(50, grid, eta)
    assert_same(
        sampler(MIXTURE.denoise, NOISE, schedule, lambda x: next(ours_draws)), expected, 1e-9
    )
    if eta == 0:
        assert_same(Euler(50, grid)(MIXTURE.denoise, NOISE, schedule), expected, 1e-9)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpm_solver_on_the_table(steps):
    """DPMSolverMultistepScheduler, dpmsolver++ of order 2, midpoint, trailing, final sigma zero."""
    scheduler = DPMSolverMultistepScheduler(
        **DDPM_TABLE, timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2
    )
    schedule, levels = on_table(scheduler, Uniform(), steps)
    expected = theirs(scheduler, outputs(Eps()), levels[0].sigma * NOISE, levels)
    sampler = DPMSolver(steps, Uniform())
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule), expected)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(EDMEulerScheduler, Euler), (EDMDPMSolverMultistepScheduler, DPMSolver)],
)
def test_edm(scheduler, sampler):
    """EDMEulerScheduler and EDMDPMSolverMultistepScheduler (order 2), raw outputs of the network.

    Preconditioning with sigma_data 0.5, the Karras grid from 80 to 0.002, final sigma zero.
    """
    scheduler = scheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    schedule, sampler = VarianceExploding(0.002, 80), sampler(18, Karras(7.0))
    levels = sampler.time_grid(schedule, 18)
    np.testing.assert_allclose(levels.sigma, scheduler.sigmas, rtol=1e-6)
    expected = theirs(scheduler, outputs(EDM(0.5)), 80 * NOISE, levels[:-1])
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule), expected)


def test_heun():
    """HeunDiscreteScheduler with Karras sigmas, in its frame alpha = 1, eps prediction."""
    scheduler = HeunDiscreteScheduler(**DDPM_TABLE, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    low, high = scheduler.sigmas[-2].item(), scheduler.sigmas[0].item()
    schedule, sampler = VarianceExploding(low, high), Heun(20, Karras(7.0, low, high))
    levels = sampler.time_grid(schedule, 20)
    calls = torch.arange(1, 20).repeat_interleave(2)
    calls = levels[torch.cat([torch.zeros(1, dtype=torch.long), calls])]
    np.testing.assert_allclose(calls.sigma[::2], scheduler.sigmas[:-1][::2], rtol=1e-5)
    expected = theirs(scheduler, outputs(Eps()), levels[0].sigma * NOISE, calls)
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule), expected)


def test_flow_matching_euler():
    """FlowMatchEulerDiscreteScheduler, no shift, velocity eps - x0, sigmas 1, 1 - 1/n, ..., 1/n."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist())
    levels = Uniform()(Rectified(), 20)
    np.testing.assert_allclose(levels.sigma, scheduler.sigmas, rtol=1e-6)
    expected = theirs(scheduler, outputs(Flow()), NOISE, levels[:-1])
    assert_same(Euler(20, Uniform())(MIXTURE.denoise, NOISE, Rectified()), expected)


def test_flow_matching_heun():
    """FlowMatchHeunDiscreteScheduler on its own sigmas, linear from 1 to 1/1000."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    levels = Rectified()(sigmas)
    calls = Rectified()(torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)]))
    expected = theirs(scheduler, outputs(Flow()), NOISE, calls)
    sampler, x = Heun(20, Uniform()), NOISE
    for state in sampler.walk(MIXTURE.denoise, x, levels, Rectified(), torch.randn_like):
        x = state
    assert_same(x, expected)
