"""The feature likelihood divergence: its fit, and the flaws of samples that it sees."""

import math

import pytest
import torch

from diffusion_lab.metrics.likelihood_divergence import Mixture, fld

DIM, COUNT = 16, 300


def draw(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Features in three clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(3, DIM, generator=torch.Generator().manual_seed(9))
    chosen = torch.arange(count) % 3
    return centres[chosen] + scale * torch.randn(count, DIM, generator=generator)


TRAINING, TEST, FRESH = draw(1500, 0), draw(600, 1), draw(COUNT, 2)


def divergence(samples: torch.Tensor) -> float:
    return fld(samples, TRAINING, TEST)


def test_the_variance_of_a_single_gaussian_is_the_closed_form():
    images = draw(200, 3)
    centre = images.mean(0, keepdim=True)
    fitted = Mixture.fitted(centre, images, "")
    spread = (images - centre).square().sum(1).mean().item() / DIM
    assert fitted.variances.item() == pytest.approx(spread, rel=0.02)
    expected = (math.log(2 * math.pi * spread) + 1) / 2
    assert fitted.surprise(images) == pytest.approx(expected, rel=0.01)


def test_a_fit_raises_the_likelihood_of_training_images():
    before = Mixture(FRESH, torch.ones(COUNT))
    assert Mixture.fitted(FRESH, TRAINING, "").surprise(TRAINING) < before.surprise(TRAINING)


@pytest.mark.slow
def test_fresh_images_diverge_by_nothing_and_worse_samples_by_more():
    real = divergence(FRESH)
    assert abs(real) < 3
    noise = torch.randn(FRESH.shape, generator=torch.Generator().manual_seed(5))
    blurred = [divergence(FRESH + level * noise) for level in (0.5, 1.0)]
    assert real + 3 < blurred[0] < blurred[1]
    assert divergence(FRESH[::3].repeat_interleave(3, 0)) > real + 1  # few distinct samples
    assert divergence(draw(900, 2)[::3]) > real + 10  # a cluster is all there is


@pytest.mark.slow
def test_copies_of_training_images_diverge_more_the_more_there_are():
    """Copies would lower FID, which compares with the training images."""
    values = [
        divergence(torch.cat([TRAINING[:copies], FRESH[copies:]])) for copies in (0, 60, 200, 285)
    ]
    assert values == sorted(values)
    assert values[-1] > values[0] + 5


def test_features_that_never_vary_count_for_nothing():
    flat = [
        torch.cat([each, torch.full((len(each), 2), 3.0)], 1) for each in (FRESH, TRAINING, TEST)
    ]
    assert math.isfinite(fld(*flat))
