"""The denoiser: the inputs of its network, and how the output is read."""

import pytest
import torch
from helpers.measured import loss_at
from torch import nn

from diffusion_lab.backbone.conditioning import Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import (
    Eps,
    Flow,
    LogitNormal,
    Objective,
    Score,
    UniformTime,
)
from diffusion_lab.diffusion.objective.loss import Denoising, Hybrid
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

SHAPE = (2, 4, 4)
OBJECTIVE = Objective(Rectified(), Flow(), LogitNormal(), Denoising())


class Recorder(nn.Module):
    """A 1 x 1 convolution that remembers its inputs."""

    condition_width = 4

    def __init__(self, in_channels, out_channels, image_size):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.seen = []

    def forward(self, x, noise, condition):
        self.seen.append((x.detach(), torch.is_grad_enabled()))
        return self.conv(x)


def denoiser(prediction=None, conditioning=Unconditional, **settings):
    torch.manual_seed(0)
    return Denoiser(
        Recorder, conditioning, prediction or Flow(), SHAPE, Classes.numbered(3), **settings
    )


def inputs(n=5):
    generator = torch.Generator().manual_seed(0)
    x, previous = (torch.randn(n, *SHAPE, generator=generator) for _ in range(2))
    return x, Rectified()(torch.linspace(0.1, 0.9, n)), previous


def test_a_plain_network_has_the_images_channels():
    model = denoiser()
    assert model.backbone.conv.weight.shape[:2] == (2, 2)
    x, level, previous = inputs()
    output = model(x, level)
    assert output.log_variance_weight is None
    # a network without self-conditioning ignores the previous estimate
    assert torch.equal(model(x, level, Given(previous=previous)).output, output.output)


def test_self_conditioning_doubles_the_input_and_nothing_is_zeros():
    model = denoiser(self_conditioning=True)
    assert model.backbone.conv.weight.shape[:2] == (2, 4)
    x, level, previous = inputs()
    alone = model(x, level).output
    assert torch.equal(alone, model(x, level, Given(previous=torch.zeros_like(x))).output)
    estimate = model(x, level, Given(previous=previous))
    assert not torch.allclose(estimate.output, alone)
    assert torch.equal(model.backbone.seen[-1][0], torch.cat([x, previous], 1))
    assert torch.equal(estimate.x0, model.prediction.to_x0(estimate.output, x, level))


def test_the_last_estimate_is_not_scaled_as_the_input_is():
    model = denoiser(self_conditioning=True, input_std=0.5)
    x, _, previous = inputs()
    level = VarianceExploding()(torch.full((5,), 0.7))
    model(x, level, Given(previous=previous))
    total_std = (0.25 + level.sigma[0] ** 2).sqrt().float()
    torch.testing.assert_close(model.backbone.seen[-1][0], torch.cat([x / total_std, previous], 1))


def test_clip_clamps_the_estimate_and_leaves_the_output():
    x, level, _ = inputs()
    plain, clipped = denoiser()(x, level), denoiser(clip=0.5)(x, level)
    assert torch.equal(clipped.output, plain.output)
    assert plain.x0.abs().max() > 0.5
    assert torch.equal(clipped.x0, plain.x0.clamp(-0.5, 0.5))


def test_learned_variance_doubles_the_output_and_halves_the_second_half():
    model = denoiser(learned_variance=True)
    assert model.backbone.conv.weight.shape[:2] == (4, 2)
    x, level, _ = inputs()
    raw = model.backbone.conv(x)
    estimate = model(x, level)
    assert torch.equal(estimate.output, raw[:, :2])
    assert torch.equal(estimate.log_variance_weight, (raw[:, 2:] + 1) / 2)
    assert torch.equal(estimate.x0, model.prediction.to_x0(estimate.output, x, level))
    nn.init.zeros_(model.backbone.conv.weight)
    nn.init.zeros_(model.backbone.conv.bias)
    assert (model(x, level).log_variance_weight == 0.5).all()


def test_both_halves_are_float32_at_least():
    model = denoiser(learned_variance=True)
    x, level, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        estimate = model(x, level)
    assert estimate.output.dtype == estimate.log_variance_weight.dtype == torch.float32
    estimate = model.double()(x.double(), level)
    assert estimate.output.dtype == estimate.log_variance_weight.dtype == torch.float64


@pytest.mark.parametrize("schedule", [Cosine(), DDPMLinear(), VarianceExploding()])
@pytest.mark.parametrize("prediction", [Score(), Score(False)])
def test_a_predicted_score_is_tweedies(prediction, schedule):
    model = denoiser(prediction).double()
    x, level = inputs()[0].double(), schedule(torch.linspace(0.1, 0.9, 5))
    alpha, sigma = (v[:, None, None, None] for v in (level.alpha, level.sigma))
    estimate = model(x, level)
    expected = estimate.output / sigma if prediction.scale_by_sigma else estimate.output
    torch.testing.assert_close((alpha * estimate.x0 - x) / sigma**2, expected)


def test_training_shows_the_network_its_own_estimate_half_of_the_time_without_gradient():
    model = denoiser(self_conditioning=True)
    generator, informed = torch.Generator().manual_seed(0), 0
    x0 = inputs()[2]
    for _ in range(100):
        model.backbone.seen.clear()
        OBJECTIVE(model, x0, generator=generator)
        *before, (last, gradient) = model.backbone.seen
        assert gradient
        if not before:
            assert (last[:, 2:] == 0).all()
            continue
        informed += 1
        ((first, gradient),) = before
        assert not gradient
        assert (first[:, 2:] == 0).all()
        assert torch.equal(first[:, :2], last[:, :2]), "the same noisy image"
        assert last[:, 2:].abs().sum() > 0
    assert informed == pytest.approx(50, abs=17)


def test_no_coin_is_drawn_where_it_decides_nothing():
    x0 = inputs()[2]
    after = []
    for model in (denoiser(), denoiser(self_conditioning=True)):
        generator = torch.Generator().manual_seed(0)
        OBJECTIVE(model, x0, generator=generator)
        after.append(torch.rand((), generator=generator))
    generator = torch.Generator().manual_seed(0)
    OBJECTIVE.time_sampler(5, Rectified(), generator)
    torch.randn(x0.shape, generator=generator)
    assert after[0] == torch.rand((), generator=generator)
    assert after[1] != after[0]


def test_gradients_survive_the_estimate_without_gradient_under_autocast():
    # autocast caches a weight that it casts without gradients, which must not serve the next pass
    model = denoiser(self_conditioning=True)
    for seed in range(4):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            generator = torch.Generator().manual_seed(seed)
            losses = OBJECTIVE(model, inputs()[2], generator=generator).minimised
        losses.mean().backward()
        assert model.backbone.conv.weight.grad.abs().sum() > 0
    assert len(model.backbone.seen) > 4, "some of them were"


def test_the_reported_loss_has_no_estimate_before_it():
    model = denoiser(self_conditioning=True)
    x, level, previous = inputs()
    loss_at(OBJECTIVE, model, previous, x, level)
    ((seen, _),) = model.backbone.seen
    assert (seen[:, 2:] == 0).all()


def test_learned_variance_and_self_conditioning_go_together():
    model = denoiser(Eps(), self_conditioning=True, learned_variance=True)
    objective = Objective(
        DDPMLinear(50, 1e-4, 0.02), Eps(), UniformTime(), Denoising(variance=Hybrid())
    )
    losses = [objective(model, inputs()[2]).minimised for _ in range(6)]
    assert all(one.shape == (5,) and one.isfinite().all() for one in losses)
    sum(one.mean() for one in losses).backward()
    assert model.backbone.conv.weight.grad[2:].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "expected"), [("time", [250, 1000]), ("index", [249, 999]), ("data_time", [0.75, 0])]
)
def test_a_noise_level_has_several_labels(name, expected):
    level = DDPMLinear()(torch.tensor([0.25, 1.0]))
    assert denoiser(noise_label=name).noise_label(level).tolist() == pytest.approx(expected)
