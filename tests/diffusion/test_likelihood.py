"""Likelihood, encoding and the adaptive solver, on distributions that are known."""

import math

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture, like
from helpers.refusals import refused
from helpers.walks import by_type, every_schedule

from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.likelihood import bits_per_dim, log_likelihood
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.sampler import AdaptiveRungeKutta
from diffusion_lab.diffusion.sampler.runge_kutta import ToleranceError, encode, integrate
from diffusion_lab.diffusion.sampler.time_grid import UniformLogSNR
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding

STD, MEAN = 0.3, 0.1
gaussian = GaussianMixture([1.0], [MEAN], STD).denoise


def test_integrate_solves_each_sample_to_its_tolerance():
    y = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    rates = torch.tensor([[-1.0], [-30.0], [0.5]], dtype=torch.float64)
    errors = []
    for tolerance in (1e-4, 1e-8):
        places = []
        for state, s in integrate(lambda y, s: rates * y, y, 0.0, 2.0, tolerance, 500):
            places.append(s)
            end = state
        errors.append((end - y * (2 * rates).exp()).abs().max())
        assert torch.equal(places[-1], torch.full((3,), 2.0, dtype=torch.float64))
    assert errors[0] < 1e-3
    assert errors[1] < 1e-7
    alone = [state for state, _ in integrate(lambda y, s: -30 * y, y[1:2], 0.0, 2.0, 1e-8, 500)]
    torch.testing.assert_close(alone[-1], end[1:2], atol=1e-14, rtol=0)


def test_integrate_is_of_order_5():
    errors = []
    for count in (4, 8, 16):  # a loose tolerance accepts all steps, which are then fixed
        y = torch.ones(1, 1, dtype=torch.float64)
        for i in range(count):
            start, end = i / count, (i + 1) / count
            *_, (y, _) = integrate(lambda y, s: y * s.cos()[:, None], y, start, end, 1e9, 10**6)
        errors.append(abs(y.item() - math.exp(math.sin(1))))
    # integrate starts with a 20th of its range and then grows its steps: still 5th order
    assert math.log2(errors[0] / errors[1]) > 4.5
    assert math.log2(errors[1] / errors[2]) > 4.5


def test_integrate_gives_up_on_a_tolerance_out_of_reach():
    with refused("3 steps", "1e-12", by=ToleranceError):
        list(integrate(lambda y, s: -50 * y, torch.ones(1, 1), 0.0, 1.0, 1e-12, 3))


@every_schedule
def test_runge_kutta_ends_on_the_exact_sample(schedule):
    mixture = GaussianMixture([0.5, 0.2, 0.3], [-1.5, 0.3, 2.0], 0.4)
    noise = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = schedule(torch.tensor(1.0))
    clean = NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    exact = mixture.transport(start.sigma * noise, start, clean)
    sampler = AdaptiveRungeKutta(500, UniformLogSNR(), 1e-6)
    x = sampler(mixture.denoise, noise, schedule)
    # one step leaves the last level, sigma / alpha = 0.002
    torch.testing.assert_close(x, exact, atol=2e-4, rtol=0)
    # independent of the rest of the batch, up to rounding of vectors of another length
    alone = sampler(mixture.denoise, noise[7:9], schedule)
    torch.testing.assert_close(alone, x[7:9], atol=1e-12, rtol=0)


@every_schedule
def test_bits_per_dim_of_a_gaussian(schedule):
    torch.manual_seed(0)
    x0 = MEAN + STD * torch.randn(16, 2, 2, 3, dtype=torch.float64)
    known = torch.distributions.Normal(MEAN, STD).log_prob(x0).flatten(1).sum(1)
    found = log_likelihood(gaussian, x0, schedule, tolerance=1e-5)
    error = bits_per_dim(found, 12) - bits_per_dim(known, 12)
    # at t = 1 some of the mean is left, 0.1 / 80 of the noise in the worst case
    assert error.abs().max() < 2e-3
    assert abs(error.mean()) < 1e-3
    # a Gaussian's Jacobian is a multiple of the identity: any probe gives its trace
    probe = torch.randint(0, 2, x0.shape).double() * 2 - 1
    guessed = log_likelihood(gaussian, x0, schedule, probe, tolerance=1e-5)
    torch.testing.assert_close(guessed, found, atol=1e-6, rtol=0)


def black_or_grey(x, level):
    """Denoises pixels that are black in half of the cases, exactly, at levels of each image."""
    level = like(x[..., None], level)
    means, stds = torch.tensor([-1.0, 0.2]).to(x), torch.tensor([0.004, 0.4]).to(x)
    variance = (level.alpha * stds) ** 2 + level.sigma**2
    residual = x[..., None] - level.alpha * means
    weights = (-(residual**2) / (2 * variance) - variance.log() / 2).softmax(-1)
    gain = level.alpha * stds**2 / variance
    return Estimate((weights * (means + gain * residual)).sum(-1))


@by_type("schedule", [Rectified(), VarianceExploding()])
def test_the_default_tolerance_is_met_near_clean_data(schedule):
    """Images with much black have a slope that changes within the first thousandth of the way."""
    generator = torch.Generator().manual_seed(0)
    black = torch.rand(4, 1, 28, 28, generator=generator) < 0.5
    noise = torch.randn(black.shape, generator=generator, dtype=torch.float64)
    x0 = torch.where(black, -1 + 0.004 * noise, 0.2 + 0.4 * noise)
    modes = torch.distributions.Normal(torch.tensor([-1.0, 0.2]), torch.tensor([0.004, 0.4]))
    known = (modes.log_prob(x0[..., None]).logsumexp(-1) + math.log(0.5)).flatten(1).sum(1)
    # the Jacobian is diagonal, so that any probe gives its trace
    found = log_likelihood(black_or_grey, x0, schedule, torch.ones_like(x0), tolerance=1e-3)
    error = bits_per_dim(found, 784) - bits_per_dim(known, 784)
    assert error.abs().max() < 0.03
    noises = [encode(black_or_grey, x0, schedule, tolerance, 1000) for tolerance in (1e-4, 1e-7)]
    assert (noises[0] - noises[1]).square().mean().sqrt() < 0.01


def test_hutchinson_is_unbiased_where_the_dimensions_mix():
    mixture = GaussianMixture([0.6, 0.4], [[-1.0, 0.0], [0.5, 1.0]], 0.3)

    x0 = mixture.sample(1)
    modes = torch.distributions.Normal(mixture.means, 0.3).log_prob(x0[:, None]).sum(-1)
    known = (modes + mixture.weights.log()).logsumexp(1)
    exact = log_likelihood(mixture.denoise, x0, Rectified(), tolerance=1e-6)
    torch.testing.assert_close(exact, known, atol=2e-3, rtol=0)
    probes = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    guesses = log_likelihood(mixture.denoise, x0.expand(4, 2), Rectified(), probes, tolerance=1e-6)
    assert guesses.std() > 1e-3
    torch.testing.assert_close(guesses.mean(), exact[0], atol=1e-5, rtol=0)


def test_bits_of_uniform_bytes_are_eight():
    # the density of images uniform over 256 grey steps
    density = -math.log(256 / 127.5)
    assert bits_per_dim(torch.tensor(10 * density), 10).item() == pytest.approx(8)


@by_type("schedule", [Rectified(), Cosine(), VarianceExploding()])
def test_encoding_goes_there_and_back(schedule):
    torch.manual_seed(0)
    x0 = MEAN + STD * torch.randn(8, 5, dtype=torch.float64)
    noise = encode(gaussian, x0, schedule, 1e-7, 500)
    torch.testing.assert_close(noise, (x0 - MEAN) / STD, atol=2e-2, rtol=0)  # exact for a Gaussian
    back = AdaptiveRungeKutta(500, UniformLogSNR(sigma_min=1e-3), 1e-7)(gaussian, noise, schedule)
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=0)
