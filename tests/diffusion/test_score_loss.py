"""Score matching without the noise: closed forms, and agreement with denoising."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.measured import loss_at
from helpers.pairs import first_fast
from torch import nn

from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.objective import Eps, Flow, Objective, Score, UniformTime
from diffusion_lab.diffusion.objective.loss import (
    SNR,
    Denoising,
    ExactScoreMatching,
    SlicedScoreMatching,
)
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding

PARTS = 20
LOSSES = [ExactScoreMatching(), SlicedScoreMatching(), SlicedScoreMatching(projections=3)]


class Bent(nn.Module):
    """Any smooth denoiser of points in the plane, whose score is no gradient."""

    clip = None
    self_conditioning = False

    def __init__(self, prediction):
        super().__init__()
        torch.manual_seed(0)
        self.prediction = prediction
        self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 2)
        self.double()

    def forward(self, x, level, given: Given = NOTHING) -> Estimate:
        output = self.outer(torch.tanh(self.inner(x.flatten(1)))).view_as(x)
        return Estimate(self.prediction.to_x0(output, x, level), None, output)


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, count, 2, 1, 1, generator=generator, dtype=torch.float64)
    return x0.sign() + 0.3 * x0.roll(1, 0), eps


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 4, 4)])
def test_a_gaussian_has_its_closed_form(loss, shape):
    x = torch.randn(5, *shape, dtype=torch.float64)
    level = Cosine()(torch.linspace(0.1, 0.9, 5))
    variance = level.alpha**2 * 0.7 + level.sigma**2
    size = math.prod(shape)
    expected = x.flatten(1).square().sum(1) / variance**2 / size - 2 / variance

    def denoiser(x, level, given):
        return GaussianMixture([1.0], [0.0], 0.7**0.5).denoise(x, level)

    # with directions of 1 and -1 the trace of a multiple of the identity has no variance
    torch.testing.assert_close(loss.matched(denoiser, x, level, NOTHING), expected)


@pytest.mark.slow
def test_sliced_losses_are_the_exact_one_in_the_mean():
    x0, eps = points(4)
    level = Rectified()(torch.full((4,), 0.5))
    denoiser, x = Bent(Flow()), x0 + eps
    exact = ExactScoreMatching().matched(denoiser, x, level, NOTHING)
    generator = torch.Generator().manual_seed(0)
    one = torch.stack(
        [SlicedScoreMatching().matched(denoiser, x, level, NOTHING, generator) for _ in range(400)]
    )
    error = one.std(0) / 20
    assert ((one.mean(0) - exact).abs() < 4 * error).all()
    assert (one.std(0) > 0.01).all()
    many = SlicedScoreMatching(projections=400).matched(denoiser, x, level, NOTHING, generator)
    assert ((many - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", first_fast([Eps(), Score(), Flow()]))
@pytest.mark.parametrize("schedule", first_fast([Rectified(), VarianceExploding(0.1, 2.0)]))
def test_they_are_the_denoising_loss_less_one_and_so_are_gradients(loss, prediction, schedule):
    count = 20_000
    x0, eps = points(count)
    level = schedule(torch.full((count,), 0.6))
    denoiser = Bent(prediction)
    weighted = Objective(schedule, prediction, UniformTime(), replace(loss, weighting=SNR()))
    denoising = loss_at(weighted, denoiser, x0, eps, level)
    other = weighted.loss(weighted.parts(), denoiser, x0, eps, level, NOTHING, None).minimised
    gap = denoising - other
    assert abs(gap.mean() - 1) < 4 * gap.std() / count**0.5
    # without a weighting the losses are of the output, and their gradients agree too
    objective = Objective(schedule, prediction, UniformTime(), loss)
    weights, gaps = (denoiser.inner.weight, denoiser.outer.weight), []
    for own in torch.arange(count).chunk(PARTS):
        given = x0[own], eps[own], schedule(torch.full((len(own),), 0.6)), NOTHING
        first, second = (
            torch.autograd.grad(losses.mean(), weights)
            for losses in (
                loss_at(objective, denoiser, *given),
                objective.loss(objective.parts(), denoiser, *given, None).minimised,
            )
        )
        gaps.append([a - b for a, b in zip(first, second, strict=True)])
    for gradient, of_parts in zip(first, zip(*gaps, strict=True), strict=True):
        of_parts = torch.stack(of_parts)
        assert (of_parts.mean(0).abs() < 5 * of_parts.std(0) / PARTS**0.5).all()
        assert of_parts.mean(0).norm() < 0.1 * gradient.norm()


def test_validation_measures_the_denoising_loss_whatever_is_trained():
    x0, eps = points(3)
    level = Rectified()(torch.full((3,), 0.5))
    denoiser = Bent(Flow())
    plain, sliced = (
        Objective(Rectified(), Flow(), UniformTime(), loss)
        for loss in (Denoising(), SlicedScoreMatching())
    )
    assert torch.equal(*(loss_at(each, denoiser, x0, eps, level) for each in (plain, sliced)))
    assert sliced.loss.forward_mode
    assert not plain.loss.forward_mode
