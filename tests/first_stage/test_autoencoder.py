"""Autoencoders: shapes, the bottlenecks' closed forms and gradients, and their metrics."""

import math
import sys

import pytest
import torch
from helpers.refusals import refused
from torch.distributions import Normal, kl_divergence

from diffusion_lab.first_stage.autoencoder import (
    FSQAutoencoder,
    KLAutoencoder,
    VQAutoencoder,
    saving,
)
from diffusion_lab.first_stage.autoencoder.base import kl_divergence as ours
from diffusion_lab.first_stage.autoencoder.base import pad_to_multiple

NETWORK = {"channels": 8, "multipliers": [1, 2, 2], "blocks": 1, "attention": True}
CODES = {"codes": 16, "decay": 0.9, "revive_below": 1.0, "commitment_weight": 0.25}


def kl(shape=(1, 8, 8), **changes) -> KLAutoencoder:
    return KLAutoencoder(shape, **({"latent_channels": 3, "kl_weight": 1.0} | NETWORK | changes))


def vq(shape=(1, 8, 8), **changes) -> VQAutoencoder:
    return VQAutoencoder(shape, **({"latent_channels": 3} | NETWORK | CODES | changes))


def fsq(shape=(1, 8, 8), **changes) -> FSQAutoencoder:
    return FSQAutoencoder(shape, **({"levels": [5, 3, 3]} | NETWORK | changes))


KINDS = [kl, vq, fsq]


@pytest.mark.parametrize("make", KINDS)
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


@pytest.mark.parametrize("make", KINDS)
def test_a_file_keeps_an_autoencoder(make, tmp_path):
    model = make()
    model.bottleneck(model.moments(torch.randn(64, 1, 8, 8)))  # initialises the codebook by k-means
    model.eval()
    settings = {"channels": 8, "multipliers": [1, 2, 2], "blocks": 1, "attention": True}
    settings |= {
        kl: {"latent_channels": 3, "kl_weight": 1.0},
        vq: {"latent_channels": 3} | CODES,
        fsq: {"levels": [5, 3, 3]},
    }[make]
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
