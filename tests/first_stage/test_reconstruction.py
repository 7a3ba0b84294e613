"""Losses of autoencoders: errors, likelihoods, features, and the adversary."""

import copy
from functools import partial

import pytest
import torch
from helpers.refusals import refused
from torch import nn

from diffusion_lab.first_stage.reconstruction import ReconstructionLoss
from diffusion_lab.first_stage.reconstruction.discriminator import PatchDiscriminator
from diffusion_lab.first_stage.reconstruction.perceptual import LPIPS, EfficientNetDistance
from diffusion_lab.first_stage.reconstruction.reconstruction_loss import adaptive_weight, hinge

PATCH = partial(PatchDiscriminator, channels=8, layers=1, weight=0.5, start=10)


def images(seed: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Decoder(nn.Module):
    """The smallest possible decoder: one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        return self.weight * x


def test_the_error_is_the_mean_over_pixels():
    x, y, bottleneck, weight = images(0), images(1), torch.tensor(0.5), torch.zeros(1)
    for kind, error in (("l1", (x - y).abs().mean()), ("l2", (x - y).square().mean())):
        loss, parts = ReconstructionLoss(1, kind, False, None, None)(x, y, bottleneck, weight, 0)
        torch.testing.assert_close(loss, error + 0.5)
        torch.testing.assert_close(parts[kind], error)


@pytest.mark.parametrize(
    ("kind", "noise"), [("l2", torch.distributions.Normal), ("l1", torch.distributions.Laplace)]
)
def test_a_calibrated_error_is_the_likelihood_at_its_best_scale(kind, noise):
    x, y = images(0).double(), images(1).double()
    scales = torch.linspace(0.3, 1.5, 2000, dtype=torch.float64)
    best = min(-noise(0.0, scale).log_prob(x - y).mean() for scale in scales)
    loss = ReconstructionLoss(1, kind, True, None, None)
    got = [loss(x, y * factor, torch.tensor(0.0), torch.zeros(1), 0)[0] for factor in (1.0, 0.5)]
    other = min(-noise(0.0, scale).log_prob(x - y / 2).mean() for scale in scales)
    torch.testing.assert_close(got[0] - got[1], best - other, atol=1e-5, rtol=0)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    decoder = Decoder()
    x, z = images(0), images(1)
    y = decoder(z)
    loss, adversarial = (x - y).square().mean(), y.sum() / 7
    # d loss / d w = -2 mean((x - w z) z), d adversarial / d w = sum(z) / 7
    first = (2 * ((x - 0.7 * z) * z).mean()).abs()
    second = (z.sum() / 7).abs()
    weight = adaptive_weight(loss, adversarial, decoder.weight)
    torch.testing.assert_close(weight, first / (second + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(loss, y.sum() * 0, decoder.weight) <= 1e4


def test_the_adversary_is_silent_before_it_starts():
    decoder, x, z = Decoder(), images(0), images(1)
    loss = ReconstructionLoss(1, "l1", False, None, PATCH)
    judge = copy.deepcopy(loss.discriminator)
    optimizer = torch.optim.AdamW([*decoder.parameters(), *loss.parameters()], lr=0.1)
    plain = ReconstructionLoss(1, "l1", False, None, None)
    for step in range(10):
        y = decoder(z)
        total, parts = loss(x, y, torch.tensor(0.0), decoder.weight, step)
        assert torch.equal(total, plain(x, y, torch.tensor(0.0), decoder.weight, step)[0])
        assert set(parts) == {"l1", "bottleneck"}
        total.backward()
        assert all(parameter.grad is not None for parameter in loss.parameters())  # as DDP needs
        loss.drop_discriminator_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
    assert decoder.weight != 0.7
    for name, value in loss.discriminator.state_dict().items():
        assert torch.equal(value, judge.state_dict()[name])


def test_both_players_get_the_gradients_of_their_own_loss():
    decoder, x, z = Decoder(), images(0), images(1)
    loss = ReconstructionLoss(1, "l1", False, None, PATCH)
    judge, y = loss.discriminator, decoder(z)
    total, parts = loss(x, y, torch.tensor(0.0), decoder.weight, 10)
    total.backward()
    loss.drop_discriminator_gradients(10)
    mine, its = decoder.weight.grad.clone(), [p.grad.clone() for p in judge.parameters()]

    judge.zero_grad()
    hinge(judge(x), judge(y.detach())).backward()
    for gradient, parameter in zip(its, judge.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    y = decoder(z)
    weight = parts["adversarial_weight"]
    expected = torch.autograd.grad((x - y).abs().mean() - weight * judge(y).mean(), decoder.weight)
    torch.testing.assert_close(mine, expected[0])
    torch.testing.assert_close(hinge(torch.ones(3), -torch.ones(3)), torch.tensor(0.0))
    torch.testing.assert_close(hinge(torch.zeros(3), torch.zeros(3)), torch.tensor(1.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_perceptual_distance_is_that_of_frozen_features(channels):
    perceptual = EfficientNetDistance(0.1, 16)
    x, y = images(0, channels), images(1, channels).requires_grad_()
    assert perceptual(x, x).abs().max() < 1e-6
    distance = perceptual(x, y)
    assert distance.shape == (4,)
    assert (distance > 0).all()
    distance.sum().backward()
    assert y.grad.abs().sum() > 0
    loss = ReconstructionLoss(channels, "l1", False, perceptual, None)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert copy.deepcopy(loss).perceptual is perceptual
    torch.testing.assert_close(
        loss(x, y, torch.tensor(0.0), torch.zeros(1), 0)[0],
        (x - y).abs().mean() + 0.1 * distance.mean(),
    )


def test_images_that_its_networks_cannot_take_are_refused():
    ReconstructionLoss(1, "l1", False, EfficientNetDistance(0.1, 16), PATCH).check((1, 8, 8))
    with refused("perceptual", "1 or 3 channels", by=ValueError):
        ReconstructionLoss(2, "l1", False, EfficientNetDistance(0.1, 16), None).check((2, 8, 8))
    deep = partial(PatchDiscriminator, channels=8, layers=6, weight=0.5, start=0)
    with refused("discriminator", "layers", by=ValueError):
        ReconstructionLoss(1, "l1", False, None, deep).check((1, 8, 8))


@pytest.mark.slow
def test_lpips_without_its_weights_says_what_to_write(monkeypatch):
    def offline(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with refused("efficientnet_lite0", by=ValueError):
        LPIPS(1.0, "vgg")
