"""Learned uncertainty: its optimum, its range, and its effect on a loss."""

import pytest
import torch
from helpers.measured import loss_at
from torch import nn

from diffusion_lab.backbone.conditioning import Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.objective import X0, Flow, LogitNormal, Objective, UniformTime
from diffusion_lab.diffusion.objective.loss import Denoising, LearnedUncertainty
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding


def test_its_optimum_is_the_log_of_the_expected_loss():
    """For gamma-distributed losses of known mean, u is log E[L] at every level to 0.1."""
    torch.manual_seed(0)
    schedule, head = VarianceExploding(), LearnedUncertainty(64)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)

    def mean(level):
        log_sigma = level.sigma.log()
        return (0.3 * log_sigma + (0.8 * log_sigma).sin() - 1).exp().float()

    for step in range(600):
        level = schedule(torch.rand(256, dtype=torch.float64))
        losses = mean(level) * torch.distributions.Gamma(4.0, 4.0).sample((256,))
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / 600)
        u = head(level)
        optimizer.zero_grad()
        (losses * (-u).exp() + u).mean().backward()
        optimizer.step()
    level = schedule(torch.linspace(0.02, 0.98, 50))
    error = (head(level) - mean(level).log()).abs()
    assert error.max() < 0.1
    assert (mean(level).log().max() - mean(level).log().min()) > 2, "not a flat line to learn"


def test_it_starts_as_the_plain_loss():
    head = LearnedUncertainty()
    assert len(head.weight) == 128
    level = Cosine()(torch.linspace(0, 1, 5))
    assert torch.equal(head(level), torch.zeros(5))


@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), VarianceExploding()])
def test_it_is_finite_at_both_ends(schedule):
    head = LearnedUncertainty()
    nn.init.ones_(head.weight)
    u = head(schedule(torch.tensor([0.0, 0.5, 1.0])))
    u.sum().backward()
    assert u.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_its_features_tell_levels_apart_and_have_unit_mean_square():
    head = LearnedUncertainty(512)
    level = Cosine()(torch.linspace(0.05, 0.95, 19))
    features = torch.stack(
        [torch.autograd.grad(head(level)[i], head.weight)[0] for i in range(len(level))]
    )
    assert (features.square().mean(1) - 1).abs().max() < 0.05
    products = features @ features.T / 512
    assert products[0, 1:].max() < 0.9
    assert products[0, -1].abs() < 0.2  # levels far apart are unrelated


def test_it_is_float32_under_autocast_and_with_bfloat16_weights():
    head, level = LearnedUncertainty(), Cosine()(torch.linspace(0.1, 0.9, 5))
    nn.init.normal_(head.weight)
    exact = head(level)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(level), exact)
    rounded = head.bfloat16()(level)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.2


class Zero(nn.Module):
    """Output 0, so that the loss is the mean square of the target."""

    self_conditioning = False
    clip = None
    conditioning = Unconditional(Classes.numbered(0), 0)

    def forward(self, x, level, given=NOTHING):
        return Estimate(x, None, torch.zeros_like(x))


def test_training_divides_by_it_and_the_reported_loss_does_not():
    x0 = torch.linspace(-1, 1, 64).reshape(16, 1, 2, 2)
    plain = Objective(Rectified(), X0(), UniformTime(), Denoising())
    learned = Objective(
        Rectified(), X0(), UniformTime(), Denoising(uncertainty=LearnedUncertainty())
    )
    nn.init.normal_(learned.loss.uncertainty.weight)
    losses = plain(Zero(), x0, generator=torch.Generator().manual_seed(0))
    level, _ = plain.time_sampler(16, Rectified(), torch.Generator().manual_seed(0))
    u = learned.loss.uncertainty(level)
    divided = learned(Zero(), x0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(divided.minimised, losses.minimised / u.exp() + u)
    eps = torch.randn(16, 1, 2, 2)
    assert torch.equal(
        loss_at(plain, Zero(), x0, eps, level),
        loss_at(learned, Zero(), x0, eps, level),
    )


def test_its_gradient_comes_from_the_loss():
    objective = Objective(
        Rectified(), Flow(), LogitNormal(), Denoising(uncertainty=LearnedUncertainty())
    )
    objective(Zero(), torch.zeros(8, 1, 2, 2)).minimised.mean().backward()
    assert objective.loss.uncertainty.weight.grad.abs().sum() > 0
