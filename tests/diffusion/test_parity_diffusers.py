"""Our samplers against diffusers' schedulers, with the exact denoiser of a mixture as the network.

Each docstring names the scheduler and settings that a test compares with. Both sides start from the
same state with the same noise; the final samples agree to 1e-5, or to 1e-9 where diffusers' float32
tables can be made float64. Samplers that diffusers lacks are compared with a few lines of the
paper's own algorithm.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from helpers.exact_denoiser import GaussianMixture
from helpers.walks import replayed

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, noise_of
from diffusion_lab.diffusion.objective import EDM, Eps, Flow, V
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
    UniPC,
)
from diffusion_lab.diffusion.sampler.time_grid import (
    Karras,
    Leading,
    Linspace,
    UniformGrid,
    UniformLogSNR,
)
from diffusion_lab.diffusion.schedule import DDPMLinear, Rectified, VarianceExploding

MIXTURE = GaussianMixture([0.6, 0.3, 0.1], [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.2)
# the settings of our time grids and guidance: final levels clean, no clipping
DDPM_TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
NOISE = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DRAWS = torch.randn(60, 64, 2, generator=torch.Generator().manual_seed(1)).double()


def outputs(prediction):
    """Makes a perfect network of this prediction type."""

    def network(x, level):
        x0 = MIXTURE.denoise(x, level).x0
        return prediction.target(x0, noise_of(x, x0, level), level)

    return network


def theirs(scheduler, network, x, levels, **step):
    """Runs diffusers' loop; `levels` are ours at each of its timesteps."""
    assert len(scheduler.timesteps) == len(levels)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        extra = {name: value() if callable(value) else value for name, value in step.items()}
        x = scheduler.step(network(x, level), t, x, **extra).prev_sample
    return x


def in_float64(scheduler):
    """Rebuilds a scheduler with its table of betas, and everything made from it, in float64."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def assert_same(x, y, atol=1e-5):
    torch.testing.assert_close(x.double(), y.double(), atol=atol, rtol=0)


def on_table(scheduler, grid, steps, **arguments):
    """Returns both sides' places on the table of 1000, which must be the same."""
    schedule = DDPMLinear()
    scheduler.set_timesteps(**(arguments or {"num_inference_steps": steps}))
    levels = grid(schedule, steps)
    index = (1000 * levels.t[:-1] - 1).round()
    assert index.tolist() == scheduler.timesteps.double().tolist()
    return schedule, levels[:-1]


@pytest.mark.parametrize(
    ("grid", "spacing"),
    [(UniformGrid(), "trailing"), (Leading(), "leading"), (Linspace(), "linspace")],
)
@pytest.mark.parametrize("steps", [4, 40, 50, 250])
def test_grids_on_the_table(grid, spacing, steps):
    """Compares the timesteps of DDIMScheduler for each spacing."""
    on_table(DDIMScheduler(**DDPM_TABLE, timestep_spacing=spacing), grid, steps)


def drawing():
    """A `randn_like` that draws as diffusers do from a generator with seed 1."""
    generator = torch.Generator().manual_seed(1)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def learned_variance(x, x0):
    """Returns some network's v for x, in [-1, 1]."""
    return (3 * x + x0).sin()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize(("grid", "steps"), [(Leading(), 50), (Leading(), 250), (Linspace(), 60)])
def test_ddpm(grid, steps, variance):
    """Compares with DDPMScheduler: eps prediction, the same noise, three variances.

    For learned_range the network has a second output, v, of which our denoiser makes (v + 1) / 2.
    Trailing spacing is left out: there diffusers adds fixed_large noise to the final, clean sample.
    """
    kind = "learned_range" if variance == "learned" else variance
    scheduler = in_float64(DDPMScheduler(variance_type=kind, clip_sample=False))
    index = (1000 * grid(DDPMLinear(), steps).t[:-1] - 1).round().long().tolist()
    schedule, levels = on_table(scheduler, grid, steps, timesteps=index)
    start = levels[0].sigma * NOISE

    def network(x, level):
        eps = outputs(Eps())(x, level)
        if variance != "learned":
            return eps
        return torch.cat([eps, learned_variance(x, MIXTURE.denoise(x, level).x0)], 1)

    def denoise(x, level):
        x0 = MIXTURE.denoise(x, level).x0
        return Estimate(x0, (learned_variance(x, x0) + 1) / 2)

    expected = theirs(scheduler, network, start, levels, generator=torch.Generator().manual_seed(1))
    sampler = Ancestral(steps, grid, 1.0, variance)
    assert_same(sampler(denoise, NOISE, schedule, drawing()), expected, 1e-9)


@pytest.mark.parametrize("prediction", [Eps(), V()])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("grid", "spacing"), [(UniformGrid(), "trailing"), (Leading(), "leading")])
def test_ddim(grid, spacing, eta, prediction):
    """Compares with DDIMScheduler: eta, given noise, eps and v prediction, set_alpha_to_one."""
    kind = "epsilon" if isinstance(prediction, Eps) else "v_prediction"
    scheduler = in_float64(
        DDIMScheduler(clip_sample=False, timestep_spacing=spacing, prediction_type=kind)
    )
    schedule, levels = on_table(scheduler, grid, 50)
    fresh, x = replayed(DRAWS), levels[0].sigma * NOISE
    noise = {"eta": eta, "variance_noise": lambda: fresh() if eta > 0 else None}
    expected = theirs(scheduler, outputs(prediction), x, levels, **noise)
    x = Ancestral(50, grid, eta)(MIXTURE.denoise, NOISE, schedule, replayed(DRAWS))
    assert_same(x, expected, 1e-9)
    if eta == 0:
        assert_same(Euler(50, grid)(MIXTURE.denoise, NOISE, schedule), expected, 1e-9)


def dpm_solver(order, **settings):
    """diffusers' DPM-Solver++ on trailing steps to a final sigma of zero."""
    return DPMSolverMultistepScheduler(
        **DDPM_TABLE,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        solver_order=order,
        **settings,
    )


@pytest.mark.parametrize(
    ("order", "kind", "steps"),
    [
        *((2, "dpmsolver++", steps) for steps in (10, 20, 50)),
        *((3, "dpmsolver++", steps) for steps in (2, 4, 5, 8, 10)),
        *((order, "sde-dpmsolver++", steps) for order in (1, 2) for steps in (10, 20, 50)),
    ],
)
def test_dpm_solver_on_the_table(order, kind, steps):
    """Compares with DPMSolverMultistepScheduler: midpoint, trailing; its SDE has the same noise.

    Both lower order 3 at the end; from 15 steps on diffusers keeps it on the last step but one, and
    we never do.
    """
    scheduler = dpm_solver(order, algorithm_type=kind)
    schedule, levels = on_table(scheduler, UniformGrid(), steps)
    start, fresh = levels[0].sigma * NOISE, replayed(DRAWS)
    expected = theirs(scheduler, outputs(Eps()), start, levels, variance_noise=fresh)
    sampler = DPMSolver(steps, UniformGrid(), order, eta=float(kind.startswith("sde")))
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule, replayed(DRAWS)), expected)


@pytest.mark.parametrize("steps", [20, 50])
def test_all_but_the_last_two_steps_of_dpm_solver_3m(steps):
    """Compares the state before the last two steps, where diffusers keeps order 3 a step longer."""
    scheduler = dpm_solver(3)
    schedule, levels = on_table(scheduler, UniformGrid(), steps)
    start = expected = levels[0].sigma * NOISE
    for t, level in zip(scheduler.timesteps[:-2], levels[:-2], strict=True):
        output = outputs(Eps())(expected, level)
        expected = scheduler.step(output, t, expected).prev_sample
    sampler = DPMSolver(steps, UniformGrid(), order=3)
    walk = sampler.walk(MIXTURE.denoise, start, sampler.levels(schedule), schedule, None)
    assert_same(list(walk)[-3], expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 20])
def test_unipc_on_the_table(steps, order):
    """Compares with UniPCMultistepScheduler: bh2 and x0, with lower_order_final.

    The spacing is trailing, and the final sigma zero.
    """
    scheduler = UniPCMultistepScheduler(
        **DDPM_TABLE, timestep_spacing="trailing", solver_order=order
    )
    schedule, levels = on_table(scheduler, UniformGrid(), steps)
    sigmas = torch.cat([levels.sigma / levels.alpha, levels.sigma.new_zeros(1)])
    np.testing.assert_allclose(scheduler.sigmas, sigmas, rtol=1e-4)
    scheduler.sigmas = sigmas  # the same numbers in float64
    expected = theirs(scheduler, outputs(Eps()), levels[0].sigma * NOISE, levels)
    assert_same(
        UniPC(steps, UniformGrid(), order)(MIXTURE.denoise, NOISE, schedule), expected, 1e-9
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_deis(steps, order):
    """Compares with DEISMultistepScheduler: logrho, trailing, without lower orders at the end.

    Its walk ends on the table's cleanest level, and ours on any level keeps its order there.
    """
    scheduler = DEISMultistepScheduler(
        **DDPM_TABLE, timestep_spacing="trailing", solver_order=order, lower_order_final=False
    )
    _, levels = on_table(scheduler, UniformGrid(), steps)
    sigmas = torch.cat([levels.sigma / levels.alpha, scheduler.sigmas[-1:].double()])
    np.testing.assert_allclose(scheduler.sigmas, sigmas, rtol=1e-4)
    scheduler.sigmas = sigmas  # the same numbers in float64
    alphas = (1 + sigmas**2) ** -0.5
    levels = NoiseLevel(torch.cat([levels.t, levels.t[-1:]]), alphas, alphas * sigmas)
    x = levels[0].sigma * NOISE
    expected = theirs(scheduler, outputs(Eps()), x, levels[:-1])
    *_, x = DEIS(steps, UniformGrid(), order).walk(MIXTURE.denoise, x, levels, None, None)
    assert_same(x, expected, 1e-9)


def test_euler_ancestral():
    """Compares with EulerAncestralDiscreteScheduler: eps prediction, the same noise, alpha = 1."""
    steps = 20
    scheduler = EulerAncestralDiscreteScheduler(**DDPM_TABLE)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    levels = NoiseLevel(sigmas, torch.ones_like(sigmas), sigmas)
    start, generator = sigmas[0] * NOISE, torch.Generator().manual_seed(1)
    expected = theirs(scheduler, outputs(Eps()), start, levels[:-1], generator=generator)
    walk = Ancestral(steps, UniformGrid()).walk
    *_, x = walk(MIXTURE.denoise, start, levels, None, drawing())
    assert_same(x, expected)


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_ipndm(steps):
    """Compares with IPNDMScheduler: v prediction, its levels sigma = sin^2(pi s / 2).

    There alpha^2 + sigma^2 = 1. The scheduler's first level is moved from beta = 1, where it
    divides by an alpha of 1e-8 and loses the sample; it takes the last step with all its history,
    too.
    """
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(steps)
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scheduler.betas = (s * math.pi / 2).sin() ** 2
    scheduler.betas[0] = 0.999
    scheduler.alphas = (1 - scheduler.betas**2).sqrt()
    levels = NoiseLevel(s, scheduler.alphas, scheduler.betas)
    x = levels[0].sigma * NOISE
    expected = theirs(scheduler, outputs(V()), x, levels[:-1])
    *_, x = IPNDM(steps, UniformGrid()).walk(MIXTURE.denoise, x, levels, None, None)
    assert_same(x, expected, 1e-9)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(EDMEulerScheduler, Euler), (EDMDPMSolverMultistepScheduler, DPMSolver)],
)
def test_edm(scheduler, sampler):
    """Compares with EDMEulerScheduler and EDMDPMSolverMultistepScheduler (order 2), raw outputs.

    Preconditioning has sigma_data 0.5, the Karras grid goes from 80 to 0.002, the final sigma is 0.
    """
    scheduler = scheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    schedule, sampler = VarianceExploding(0.002, 80), sampler(18, Karras())
    levels = sampler.time_grid(schedule, 18)
    np.testing.assert_allclose(levels.sigma, scheduler.sigmas, rtol=1e-6)
    expected = theirs(scheduler, outputs(EDM(0.5)), 80 * NOISE, levels[:-1])
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule), expected)


def test_heun():
    """Compares with HeunDiscreteScheduler: Karras sigmas, its frame alpha = 1, eps prediction."""
    scheduler = HeunDiscreteScheduler(**DDPM_TABLE, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    low, high = scheduler.sigmas[-2].item(), scheduler.sigmas[0].item()
    schedule, sampler = VarianceExploding(low, high), Heun(20, Karras(low, high))
    levels = sampler.time_grid(schedule, 20)
    calls = torch.arange(1, 20).repeat_interleave(2)
    calls = levels[torch.cat([torch.zeros(1, dtype=torch.long), calls])]
    np.testing.assert_allclose(calls.sigma[::2], scheduler.sigmas[:-1][::2], rtol=1e-5)
    expected = theirs(scheduler, outputs(Eps()), levels[0].sigma * NOISE, calls)
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule), expected)


def test_flow_matching_euler():
    """Compares with FlowMatchEulerDiscreteScheduler: no shift, eps - x0, sigmas from 1 to 1/n."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist())
    levels = UniformGrid()(Rectified(), 20)
    np.testing.assert_allclose(levels.sigma, scheduler.sigmas, rtol=1e-6)
    expected = theirs(scheduler, outputs(Flow()), NOISE, levels[:-1])
    assert_same(Euler(20, UniformGrid())(MIXTURE.denoise, NOISE, Rectified()), expected)


def test_flow_matching_heun():
    """Compares with FlowMatchHeunDiscreteScheduler on its own sigmas, linear from 1 to 1/1000."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    levels = Rectified()(sigmas)
    calls = Rectified()(torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)]))
    expected = theirs(scheduler, outputs(Flow()), NOISE, calls)
    walk = Heun(20, UniformGrid()).walk
    *_, x = walk(MIXTURE.denoise, NOISE, levels, Rectified(), torch.randn_like)
    assert_same(x, expected)


def x0_of(x, sigma):
    """Returns the denoised x at noise sigma, alpha = 1."""
    return MIXTURE.denoise(x, NoiseLevel(sigma, torch.ones_like(sigma), sigma)).x0


def edm_grid(high, low, points):
    i = torch.arange(points, dtype=torch.float64) / (points - 1)
    return (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def edm_levels(steps):
    return torch.cat([edm_grid(80, 0.002, steps), torch.zeros(1, dtype=torch.float64)])


def edm_step(x, sigma, after):
    slope = (x - x0_of(x, sigma)) / sigma
    guess = x + (after - sigma) * slope
    if after == 0:
        return guess
    return x + (after - sigma) * (slope + (guess - x0_of(guess, after)) / after) / 2


def test_edm_with_churn():
    """Compares with algorithm 2 of arXiv:2206.00364 and EDM's constants for ImageNet-64."""
    steps, churn, low, high, scale = 18, 40, 0.05, 50, 1.003
    x, fresh = 80 * NOISE, replayed(DRAWS)
    for now, then in pairwise(edm_levels(steps)):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= now <= high else 0
        raised = now + gamma * now
        if gamma > 0:
            x = x + (raised**2 - now**2).sqrt() * scale * fresh()
        x = edm_step(x, raised, then)

    fresh = iter(DRAWS[:steps])
    sampler = Heun(steps, Karras(), churn, low, high, scale)
    ours = sampler(MIXTURE.denoise, NOISE, VarianceExploding(), lambda x: next(fresh))
    assert len(list(fresh)) > 2  # no noise outside of the churn range
    assert_same(ours, x, 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpm_solver_2s_ancestral(eta):
    """Compares with k-diffusion's rule, in t = -log sigma and with alpha = 1."""
    steps, schedule = 12, VarianceExploding(0.02, 50.0)
    sigmas = Karras(0.02, 50.0)(schedule, steps).sigma
    x, fresh = sigmas[0] * NOISE, replayed(DRAWS)
    for sigma, after in pairwise(sigmas):
        up = eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        down = (after**2 - up**2).sqrt()
        x0 = x0_of(x, sigma)
        if after == 0:
            x = x0
            continue
        h = sigma.log() - down.log()
        middle = (sigma * down).sqrt()
        half = middle / sigma * x - torch.expm1(-h / 2) * x0
        x = down / sigma * x - torch.expm1(-h) * x0_of(half, middle)
        x = x + up * fresh()

    sampler = AncestralDPMSolver(steps, Karras(0.02, 50.0), eta)
    assert_same(sampler(MIXTURE.denoise, NOISE, schedule, replayed(DRAWS)), x, 1e-9)


@pytest.mark.parametrize(
    "restarts", [[(0.06, 0.3, 2, 2)], [(19.35, 40.79, 2, 1), (1.09, 1.92, 3, 1), (0.06, 0.3, 3, 4)]]
)
def test_restart(restarts):
    """Compares with algorithm 1 of arXiv:2306.14878 and its settings for CIFAR-10 and ImageNet-64.

    Low ends are moved to the nearest level of EDM's grid; the way back has EDM's spacing; a noise
    scale of 1.003 is applied to the noise of restarts.
    """
    steps = 18
    sigmas = edm_levels(steps)
    begins = {int((sigmas - low).abs().argmin()): rest for low, *rest in restarts}
    x, fresh = 80 * NOISE, replayed(DRAWS)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x = edm_step(x, sigma, after)
        if i + 1 in begins:
            high, back, times = begins[i + 1]
            for _ in range(times):
                way = edm_grid(high, after, back + 1)
                x = x + 1.003 * (high**2 - after**2).sqrt() * fresh()
                for a, b in pairwise(way):
                    x = edm_step(x, a, b)

    sampler = Restart(steps, Karras(), restarts, noise_scale=1.003)
    ours = sampler(MIXTURE.denoise, NOISE, VarianceExploding(), replayed(DRAWS))
    assert_same(ours, x, 1e-9)


def score(x, sigma):
    """Returns the gradient of log p of x at noise sigma, alpha = 1."""
    return (x0_of(x, sigma) - x) / sigma**2


def test_annealed_langevin():
    """Compares with algorithm 1 of arXiv:2006.09011, its CIFAR-10 constants and its denoising step.

    12 geometric sigmas stand for its 232.
    """
    sigmas = torch.logspace(math.log10(50), -2, 12, dtype=torch.float64)
    x, fresh = sigmas[0] * NOISE, replayed(DRAWS)
    for sigma in sigmas:
        step = 6.2e-6 * sigma**2 / sigmas[-1] ** 2
        for _ in range(5):
            x = x + step * score(x, sigma) + (2 * step).sqrt() * fresh()
    x = x + sigmas[-1] ** 2 * score(x, sigmas[-1])

    schedule = VarianceExploding(0.01, 50.0)
    levels = schedule.at_logsnr(-2 * torch.cat([sigmas, sigmas[-1:] * 0]).log())
    levels = NoiseLevel(levels.t, levels.alpha, torch.cat([levels.sigma[:-1], sigmas[:1] * 0]))
    walk = AnnealedLangevin(12, UniformLogSNR()).walk
    *_, state = walk(MIXTURE.denoise, sigmas[0] * NOISE, levels, schedule, replayed(DRAWS))
    assert_same(state, x, 1e-9)


@pytest.mark.parametrize("corrector", ["langevin", "annealed"])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_predictor_corrector(variance, corrector):
    """Compares with score-SDE's variance-exploding sampler (arXiv:2011.13456, alg. 2, 4).

    Its correctors are LangevinCorrector and AnnealedLangevinDynamics, its predictors
    ReverseDiffusionPredictor (fixed_large) and AncestralSamplingPredictor (fixed_small); the batch
    is one image, and the last predictor step has no noise.
    """
    snr, steps, schedule = 0.16, 30, VarianceExploding(0.01, 50.0)
    sigmas = UniformGrid()(schedule, steps).sigma
    draws = DRAWS[:, :1]
    x, fresh = sigmas[0] * NOISE[:1], replayed(draws)
    for sigma, after in pairwise(sigmas):
        gradient, z = score(x, sigma), fresh()
        step = 2 * (snr * sigma) ** 2
        if corrector == "langevin":
            step = 2 * (snr * z.norm() / gradient.norm()) ** 2
        x = x + step * gradient + (2 * step).sqrt() * z
        x = x + (sigma**2 - after**2) * score(x, sigma)
        if after > 0:
            variance_added = sigma**2 - after**2
            if variance == "fixed_small":
                variance_added = after**2 * variance_added / sigma**2
            x = x + variance_added.sqrt() * fresh()

    sampler = PredictorCorrector(steps, UniformGrid(), snr, 1, corrector, variance)
    assert_same(sampler(MIXTURE.denoise, NOISE[:1], schedule, replayed(draws)), x, 1e-9)
