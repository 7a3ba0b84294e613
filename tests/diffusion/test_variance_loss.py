"""The bound that trains a reverse variance, against formulas written out."""

import math

import pytest
import torch
from helpers.measured import loss_at

from diffusion_lab.backbone.conditioning import Unconditional
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.objective import Eps, Objective, UniformTime, V
from diffusion_lab.diffusion.objective.loss import Denoising, Hybrid
from diffusion_lab.diffusion.objective.loss.variance import bound_term, negative_log_likelihood
from diffusion_lab.diffusion.schedule import DDPMLinear

STEPS = 100
SCHEDULE = DDPMLinear(STEPS)
FIRST, LAST = 0, STEPS - 1  # indices of the table, as in the published code


class Published:
    """guided-diffusion's bound in float64, from its betas alone; t are indices from 0."""

    def __init__(self, alphas_cumprod):
        previous = torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])
        self.betas = 1 - alphas_cumprod / previous
        self.cumprod, self.previous = alphas_cumprod, previous
        variance = self.betas * (1 - previous) / (1 - alphas_cumprod)
        self.log_clipped = torch.cat([variance[1:2], variance[1:]]).log()

    def mean(self, x0, x, t):
        first = self.betas * self.previous.sqrt() / (1 - self.cumprod)
        alphas = 1 - self.betas
        second = (1 - self.previous) * alphas.sqrt() / (1 - self.cumprod)
        return first[t, None, None, None] * x0 + second[t, None, None, None] * x

    def bits(self, x0, x, x0_hat, fraction, t):
        low = self.log_clipped[t, None, None, None]
        high = self.betas.log()[t, None, None, None]
        log_variance = fraction * high + (1 - fraction) * low
        mean, guess = self.mean(x0, x, t), self.mean(x0_hat, x, t)
        kl = 0.5 * (
            -1
            + log_variance
            - low
            + torch.exp(low - log_variance)
            + (mean - guess) ** 2 * torch.exp(-log_variance)
        )
        nll = -self.log_likelihood(x0, guess, 0.5 * log_variance)
        kl, nll = (value.mean((1, 2, 3)) / math.log(2) for value in (kl, nll))
        return torch.where(t == 0, nll, kl)

    @staticmethod
    def log_likelihood(x, means, log_scales):
        def cdf(value):  # the published code uses a tanh within 2e-4 of this
            return 0.5 * (1 + torch.erf(value / math.sqrt(2)))

        centered = x - means
        inverse = torch.exp(-log_scales)
        plus, minus = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
        inside = (plus - minus).clamp(min=1e-12).log()
        upper = (1 - minus).clamp(min=1e-12).log()
        middle = torch.where(x > 0.999, upper, inside)
        return torch.where(x < -0.999, plus.clamp(min=1e-12).log(), middle)


def example(index, n=6, seed=0):
    """Makes clean images (both ends included), noisy ones, an estimate and a variance, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 2, 3, 3)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    eps, error, fraction = (torch.randn(shape, generator=generator).double() for _ in range(3))
    index = torch.as_tensor(index).expand(n)
    level = SCHEDULE((index + 1).double() / STEPS)
    return index, level, x0, add_noise(x0, eps, level), x0 + 0.01 * error, fraction.sigmoid()


@pytest.mark.parametrize("index", [FIRST, 1, 2, 50, LAST, [0, 1, 5, 30, 70, 99]])
def test_it_is_the_published_bound(index):
    """Compares with guided-diffusion's bits per dimension in float64, first step included."""
    t, level, x0, x, x0_hat, fraction = example(torch.tensor(index))
    alphas_cumprod = SCHEDULE(torch.arange(1, STEPS + 1).double() / STEPS).alpha ** 2
    expected = Published(alphas_cumprod).bits(x0, x, x0_hat, fraction, t)
    bits = bound_term(x, x0, x0_hat, fraction, level, SCHEDULE)
    torch.testing.assert_close(bits, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("index", [FIRST, 1, LAST])
def test_float32_is_enough(index):
    _, level, x0, x, x0_hat, fraction = example(index)
    exact = bound_term(x, x0, x0_hat, fraction, level, SCHEDULE)
    single = bound_term(*(v.float() for v in (x, x0, x0_hat, fraction)), level, SCHEDULE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-3, atol=1e-4)


def test_the_likelihoods_of_all_bins_add_up_to_one():
    bins = torch.arange(256).double() / 127.5 - 1
    for mean in (-1.2, 0.013, 0.97):
        log_variance = torch.full((256,), math.log(0.05**2)).double()
        nats = negative_log_likelihood(bins, torch.full_like(bins, mean), log_variance)
        assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_weights_are_those_of_the_hybrid_loss():
    assert Hybrid().weight == 0.001
    _, level, x0, x, x0_hat, fraction = example(7)
    bits = bound_term(x, x0, x0_hat, fraction, level, SCHEDULE)
    added = Hybrid(0.01)(x, x0, Estimate(x0_hat, fraction), level, SCHEDULE)
    torch.testing.assert_close(added, 0.01 * STEPS * bits)


class Affine(torch.nn.Module):
    """A network with one parameter for each half of its output."""

    condition_width = 1

    def __init__(self, in_channels, out_channels, image_size):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(0.3))
        self.variance = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, noise, condition):
        return torch.cat([self.value * x, self.variance * x], 1)


@pytest.mark.parametrize("prediction", [Eps(), V()])
def test_only_the_variance_learns_from_the_bound(prediction):
    denoiser = Denoiser(Affine, Unconditional, prediction, (2, 3, 3), 0, learned_variance=True)
    _, level, x0, _, _, _ = example(torch.tensor([0, 1, 5, 30, 70, 99]))
    eps = torch.randn_like(x0)

    def gradients(objective):
        denoiser.zero_grad()
        loss_at(objective, denoiser, x0, eps, level).mean().backward()
        network = denoiser.backbone
        return network.value.grad.clone(), network.variance.grad

    simple, none = gradients(Objective(SCHEDULE, prediction, UniformTime(), Denoising()))
    hybrid, variance = gradients(
        Objective(SCHEDULE, prediction, UniformTime(), Denoising(variance=Hybrid()))
    )
    assert none == 0
    assert torch.equal(simple, hybrid)
    assert variance.abs() > 0
