"""Order of convergence of every deterministic sampler, and the multistep samplers' own rules."""

import math
from functools import cache, partial

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.walks import every_schedule

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.sampler import (
    DEIS,
    IPNDM,
    AncestralDPMSolver,
    DPMSolver,
    Euler,
    Heun,
    UniPC,
)
from diffusion_lab.diffusion.sampler.multistep import ADAMS, moments, order_at
from diffusion_lab.diffusion.sampler.time_grid import Karras, UniformGrid
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding

MIXTURE = GaussianMixture([0.5, 0.2, 0.3], [-1.5, 0.3, 2.0], 0.4)


@cache
def start_and_end(schedule):
    """Points at t = 0.95, and the ends of the ODE from there at t = 0.05."""
    start, end = schedule(torch.tensor([0.95, 0.05], dtype=torch.float64))
    noise = torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = start.alpha * torch.linspace(-2, 2.5, 100).double()[:, None] + start.sigma * noise
    return x, MIXTURE.transport(x, start, end)


def errors_of(sampler, schedule, counts, first_steps=()):
    """Returns RMS distances to the exact end of the ODE, from t = 0.95 to 0.05, for step counts."""
    x, exact = start_and_end(schedule)
    errors = []
    for steps in counts:
        t = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        t = torch.cat([t[:1], 0.95 - 0.9 * t.new_tensor(first_steps), t[1:]])
        walk = sampler(len(t) - 1, UniformGrid()).walk
        *_, state = walk(MIXTURE.denoise, x, schedule(t), schedule, None)
        errors.append((state - exact).square().mean().sqrt().item())
    return errors


def slope(counts, errors):
    """Fits the order: -d log(error) / d log(steps)."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return -(x @ y / (x @ x)).item()


# Multistep rules start at lower order; two steps of 1e-5 of the range keep that error out.
FIRST_STEPS = (1e-5, 2e-5)
MANY, FEW = [80, 160, 320], [20, 40, 80, 160]
ORDERS = {  # the sampler, its order, the counts of steps, and its first steps
    "euler": (Euler, 1, FEW, ()),
    "dpm_1": (partial(DPMSolver, order=1), 1, FEW, ()),
    "dpm_2m": (DPMSolver, 2, FEW, ()),
    "dpm_3m_whole": (partial(DPMSolver, order=3, curvature=1.0), 3, MANY, FIRST_STEPS),
    "dpm_2s": (partial(AncestralDPMSolver, eta=0.0), 2, FEW, ()),
    "heun": (Heun, 2, FEW, ()),
    "unipc_1": (partial(UniPC, order=1), 2, FEW, ()),
    "unipc_2": (UniPC, 3, MANY, ()),
    "unipc_3": (partial(UniPC, order=3), 4, [160, 320], ()),
    "ipndm_2": (partial(IPNDM, order=2), 2, [40, 80, 160], ()),
    "ipndm_4": (IPNDM, 2, [160, 320], ()),  # on steps that are not equal in logSNR
    "deis_1": (partial(DEIS, order=1), 1, FEW, ()),
    "deis_2": (partial(DEIS, order=2), 2, MANY, ()),
    "deis_3": (DEIS, 3, [160, 320], FIRST_STEPS),
}
LOOSE = {"unipc_3": 0.25, "ipndm_4": 0.2}


@every_schedule
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, schedule):
    sampler, order, counts, first_steps = ORDERS[name]
    errors = errors_of(sampler, schedule, counts, first_steps)
    assert slope(counts, errors) == pytest.approx(order, abs=LOOSE.get(name, 0.15))


@every_schedule
def test_published_3m_is_of_second_order_with_a_smaller_error_than_2m(schedule):
    # order 3 would need the whole last term of the quadratic; half of it is missing
    counts = [160, 320]
    third = errors_of(partial(DPMSolver, order=3), schedule, counts, FIRST_STEPS)
    second = errors_of(DPMSolver, schedule, counts, FIRST_STEPS)
    assert slope(counts, third) == pytest.approx(2, abs=0.25)
    assert all(three < two / 2 for three, two in zip(third, second, strict=True))


@pytest.mark.parametrize("h", [0.05, 0.7, 4.0])
def test_moments_are_the_integrals_that_they_stand_for(h):
    r = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    weight = h * (h * r).exp() / math.expm1(h)
    for k, moment in enumerate(moments(h, 3), start=1):
        assert moment == pytest.approx(torch.trapezoid(weight * r**k, r).item(), rel=1e-7)


@pytest.mark.parametrize(("estimates", "with_end"), [(2, True), (3, True), (3, False)])
def test_unipc_jumps_with_the_exact_mean_of_a_polynomial(estimates, with_end):
    # the weighted integral of the highest power that so many nodes determine
    places, power = [-1.1, -0.6, 0.1, 0.9], estimates - 1 + with_end
    x0 = [torch.tensor(place, dtype=torch.float64) ** power for place in places]
    known = x0[-2::-1][:estimates]
    blend = UniPC(4, UniformGrid(), 3).blend(known, places, x0[-1] if with_end else None)
    lam = torch.linspace(places[-2], places[-1], 20_001, dtype=torch.float64)
    mean = torch.trapezoid(lam.exp() * lam**power, lam) / torch.trapezoid(lam.exp(), lam)
    assert blend.item() == pytest.approx(mean.item(), rel=1e-7)


def test_unipc_of_one_estimate_is_the_trapezoid_in_alpha_over_sigma():
    start, end = torch.tensor(2.0), torch.tensor(5.0)
    blend = UniPC(4, UniformGrid(), 1).blend([start], [-math.inf, 0.3], end)
    assert blend.item() == 3.5  # finite even from pure noise


@pytest.mark.parametrize("order", [2, 3])
def test_orders_rise_from_the_start_and_fall_to_clean_data(order):
    rising = [1, 2, 3, 3, 3, 2, 1] if order == 3 else [1, 2, 2, 2, 2, 2, 1]
    levels = Karras()(Cosine(), 7)
    assert [order_at(i, levels, order) for i in range(7)] == rising
    # logSNR is infinite on pure noise, so no step extrapolates from there
    levels = Karras()(Rectified(), 7)
    assert [order_at(i, levels, order) for i in range(7)] == [1, *rising[:3], *rising[4:]]
    # a walk that ends on noise keeps its order
    assert [order_at(i, levels[1:5], order) for i in range(3)] == rising[:3]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_from_pure_noise_are_finite(steps, order):
    noise = torch.randn(8, 1, dtype=torch.float64)
    for sampler in (DPMSolver, UniPC, IPNDM):
        x = sampler(steps, UniformGrid(), order=order)(MIXTURE.denoise, noise, Rectified())
        assert x.isfinite().all()
        assert x.abs().max() < 4


def test_adams_weights_integrate_polynomials_over_the_next_step():
    for order, weights in enumerate(ADAMS, start=1):
        for power in range(order):
            value = sum(w * (-k) ** power for k, w in enumerate(weights))
            assert value == pytest.approx(1 / (power + 1), abs=1e-12)


def test_dpm_solver_extrapolates_in_logsnr():
    # an estimate linear in logSNR, extrapolated to the middle of the second step
    schedule, x = VarianceExploding(0.1, 10.0), torch.zeros(1, dtype=torch.float64)
    levels = schedule(torch.tensor([1.0, 0.6, 0.4]))
    estimates = {level.t.item(): level.logsnr for level in levels}

    def denoise(x, level):
        return Estimate(estimates[level.t.item()].expand_as(x))

    first, second = DPMSolver(2, UniformGrid()).walk(denoise, x, levels, schedule, None)
    sigma, middle = levels.sigma, (levels.logsnr[1] + levels.logsnr[2]) / 2
    expected = (1 - sigma[1] / sigma[0]) * levels.logsnr[0]
    assert first.item() == pytest.approx(expected.item(), rel=1e-12)
    expected = sigma[2] / sigma[1] * first + (1 - sigma[2] / sigma[1]) * middle
    assert second.item() == pytest.approx(expected.item(), rel=1e-12)
