"""Autoencoders: shapes, the bottlenecks' closed forms and gradients, and their metrics."""

import copy
import math
import sys
from functools import partial

import pytest
import torch
from helpers.refusals import refused
from helpers.tiny_runs import same
from torch import nn
from torch.distributions import Normal, kl_divergence

from diffusion_lab.first_stage.autoencoder import (
    FSQAutoencoder,
    KLAutoencoder,
    VQAutoencoder,
    saving,
)
from diffusion_lab.first_stage.autoencoder.base import kl_divergence as ours
from diffusion_lab.first_stage.autoencoder.base import pad_to_multiple
from diffusion_lab.first_stage.reconstruction import ReconstructionLoss
from diffusion_lab.first_stage.reconstruction.discriminator import PatchDiscriminator
from diffusion_lab.first_stage.reconstruction.perceptual import LPIPS, EfficientNetDistance
from diffusion_lab.first_stage.reconstruction.reconstruction_loss import adaptive_weight, hinge

NETWORK = {"channels": 8, "multipliers": [1, 2, 2], "blocks": 1, "attention": True}
CODES = {"codes": 16, "decay": 0.9, "revive_below": 1.0, "commitment_weight": 0.25}


KL = NETWORK | {"latent_channels": 3, "kl_weight": 1.0}
VQ = NETWORK | {"latent_channels": 3} | CODES
FSQ = NETWORK | {"levels": [5, 3, 3]}


def kl(shape=(1, 8, 8), **changes) -> KLAutoencoder:
    return KLAutoencoder(shape, **(KL | changes))


def vq(shape=(1, 8, 8), **changes) -> VQAutoencoder:
    return VQAutoencoder(shape, **(VQ | changes))


def fsq(shape=(1, 8, 8), **changes) -> FSQAutoencoder:
    return FSQAutoencoder(shape, **(FSQ | changes))


@pytest.mark.parametrize("make", [kl, vq, fsq])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (30, 17), (5, 8)])
def test_any_size_goes_there_and_back(make, channels, height, width):
    model = make((channels, height, width)).eval()
    images = torch.rand(2, channels, height, width) * 2 - 1
    latents = model.mean(model.moments(images))
    assert latents.shape == (2, *model.latent_shape)
    assert model.latent_shape == (3, math.ceil(height / 4), math.ceil(width / 4))
    assert model.decode(latents).shape == images.shape
    assert model.decode(latents).dtype == torch.float32
    assert model(images)[0].shape == images.shape


@pytest.mark.parametrize("make", [vq, fsq])
def test_codes_stand_for_the_latents_that_are_decoded(make):
    model = make().eval()
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    model(images)  # initialises a codebook by k-means
    latents = model.moments(images)
    quantised, codes, _ = model.assign(latents)
    assert codes.shape == (3, *model.latent_shape[1:])
    torch.testing.assert_close(model.vectors(codes.long()), quantised)


def test_padding_repeats_the_border():
    images = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to_multiple(images, 4)
    assert padded[0, 0].tolist() == [[0, 1, 2, 2], *[[3, 4, 5, 5]] * 3]
    assert torch.equal(pad_to_multiple(padded, 4), padded)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_each_level_but_the_first_halves_the_image(levels):
    model = kl((1, 16, 16), multipliers=[1] * levels)
    assert model.latent_shape == (3, 32 // 2**levels, 32 // 2**levels)


def test_the_kl_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 3, 4, 4)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(ours(mean, log_variance), expected.flatten(1).sum(1))


def test_samples_have_the_posterior_s_mean_and_variance():
    torch.manual_seed(0)
    model = kl()
    moments = torch.randn(1, 6, 2, 2).expand(20_000, -1, -1, -1)
    drawn = model.sample(moments)
    torch.testing.assert_close(drawn.mean(0), model.mean(moments)[0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0), model.variance(moments)[0], atol=0.05, rtol=0.05)
    latents, loss = model.bottleneck(moments[:4])
    assert latents.shape == (4, 3, 2, 2)
    nats = ours(*model.mean_and_log_variance(moments[:4])).mean()
    torch.testing.assert_close(loss, nats / 64)  # an image has 64 numbers
    assert model.metrics(model.statistics(moments[:4]), 4) == {"kl": pytest.approx(nats.item())}


@pytest.mark.parametrize("make", [vq, fsq])
def test_gradients_pass_the_quantiser_as_if_it_were_not_there(make):
    model = make()
    moments = torch.randn(9, 3, 2, 2, requires_grad=True)
    quantised, _ = model.bottleneck(moments)
    assert not torch.equal(quantised, moments)
    slope = torch.randn_like(moments)
    (found,) = torch.autograd.grad((quantised * slope).sum(), moments, retain_graph=True)
    if make is vq:
        torch.testing.assert_close(found, slope)
    else:  # tanh keeps values within the levels
        assert (found * slope > 0).all()


def test_vectors_become_their_nearest_codes():
    model = vq()
    model.bottleneck(torch.randn(64, 3, 2, 2))  # initialises the codebook by k-means
    model.eval()
    codebook = model.quantiser.codebook
    latents = codebook[torch.arange(16)].T.reshape(1, 3, 4, 4) + 1e-4
    torch.testing.assert_close(model.quantise(latents), latents, atol=2e-4, rtol=0)
    assert torch.equal(model.assign(latents)[1].flatten().sort().values, torch.arange(16))


@pytest.mark.parametrize(("revive_below", "least", "most"), [(1.0, 0.7, 1.0), (0.0, 0.0, 0.3)])
def test_dead_codes_are_taken_up_anew(revive_below, least, most):
    torch.manual_seed(0)
    model = vq(revive_below=revive_below)
    model.bottleneck(torch.randn(64, 3, 2, 2))
    for _ in range(30):
        model.bottleneck(5 + torch.randn(64, 3, 2, 2))
    model.eval()
    used = model.statistics(5 + torch.randn(256, 3, 2, 2))
    assert least < model.metrics(used, 256)["codebook_usage"] <= most


def test_usage_and_perplexity():
    model = vq()
    assert model.metrics(torch.tensor([5, 5] + [0] * 14), 1) == {
        "codebook_usage": 2 / 16,
        "perplexity": pytest.approx(2.0),
    }
    assert model.metrics(torch.ones(16), 1)["perplexity"] == pytest.approx(16.0)
    assert fsq().codes == 45


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with refused("pip install 'diffusion-lab[latent]'", by=ValueError):
        vq()


@pytest.mark.parametrize(("make", "settings"), [(kl, KL), (vq, VQ), (fsq, FSQ)])
def test_a_file_keeps_an_autoencoder(make, settings, tmp_path):
    model = make()
    model.bottleneck(model.moments(torch.randn(64, 1, 8, 8)))  # initialises the codebook by k-means
    model.eval()
    facts = saving.AutoencoderFacts(
        model.kind, settings, [1, 8, 8], [0.0] * 3, [1.0] * 3, "data", {"val/psnr": 9.0}
    )
    saving.save_autoencoder(model, facts, tmp_path / "a.safetensors")
    again, read, content = saving.load_autoencoder(tmp_path / "a.safetensors")
    assert (read, content) == (facts, (tmp_path / "a.safetensors").read_bytes())
    latents = torch.randn(2, *model.latent_shape)
    assert torch.equal(again.decode(latents), model.decode(latents))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with refused(path, "train-autoencoder", by=ValueError):
        saving.load_autoencoder(path)
    path.write_bytes(b"not a file of tensors")
    with refused(path, by=ValueError):
        saving.load_autoencoder(path)


PATCH = partial(PatchDiscriminator, channels=8, layers=1, weight=0.5, start=10)


def images(seed: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(kind: str = "l1", calibrated: bool = False) -> ReconstructionLoss:
    """A loss of pixels alone."""
    return ReconstructionLoss(1, kind, calibrated, None, None)


NO_BOTTLENECK, NO_WEIGHT = torch.tensor(0.0), torch.zeros(1)


class Decoder(nn.Module):
    """The smallest possible decoder: one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        return self.weight * x


def test_the_error_is_the_mean_over_pixels():
    x, y = images(0), images(1)
    for kind, error in (("l1", (x - y).abs().mean()), ("l2", (x - y).square().mean())):
        loss, parts = plain(kind)(x, y, torch.tensor(0.5), NO_WEIGHT, 0)
        torch.testing.assert_close(loss, error + 0.5)
        torch.testing.assert_close(parts[kind], error)


@pytest.mark.parametrize(
    ("kind", "noise"), [("l2", torch.distributions.Normal), ("l1", torch.distributions.Laplace)]
)
def test_a_calibrated_error_is_the_likelihood_at_its_best_scale(kind, noise):
    x, y = images(0).double(), images(1).double()
    scales = torch.linspace(0.3, 1.5, 2000, dtype=torch.float64)[:, None]
    found, best = [], []
    for made in (y, y / 2):
        found.append(plain(kind, calibrated=True)(x, made, NO_BOTTLENECK, NO_WEIGHT, 0)[0])
        best.append(-noise(0.0, scales).log_prob((x - made).flatten()).mean(1).max())
    torch.testing.assert_close(found[0] - found[1], best[0] - best[1], atol=1e-5, rtol=0)


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
    for step in range(10):
        y = decoder(z)
        total, parts = loss(x, y, NO_BOTTLENECK, decoder.weight, step)
        assert torch.equal(total, plain()(x, y, NO_BOTTLENECK, decoder.weight, step)[0])
        assert set(parts) == {"l1", "bottleneck"}
        total.backward()
        assert all(parameter.grad is not None for parameter in loss.parameters())  # as DDP needs
        loss.drop_discriminator_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
    assert decoder.weight != 0.7
    assert same(loss.discriminator.state_dict(), judge.state_dict())


def test_both_players_get_the_gradients_of_their_own_loss():
    decoder, x, z = Decoder(), images(0), images(1)
    loss = ReconstructionLoss(1, "l1", False, None, PATCH)
    judge, y = loss.discriminator, decoder(z)
    total, parts = loss(x, y, NO_BOTTLENECK, decoder.weight, 10)
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
    total, _ = loss(x, y, NO_BOTTLENECK, NO_WEIGHT, 0)
    torch.testing.assert_close(total, (x - y).abs().mean() + 0.1 * distance.mean())


def test_images_that_its_networks_cannot_take_are_refused():
    perceptual = EfficientNetDistance(0.1, 16)
    ReconstructionLoss(1, "l1", False, perceptual, PATCH).check((1, 8, 8))
    with refused("perceptual", "1 or 3 channels", by=ValueError):
        ReconstructionLoss(2, "l1", False, perceptual, None).check((2, 8, 8))
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
