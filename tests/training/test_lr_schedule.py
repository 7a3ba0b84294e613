"""Tests of learning-rate schedules."""

import pytest

from diffusion_lab.training.lr_schedule import ConstantRate, CosineDecay, InverseSqrt


def test_warm_up_is_linear_in_images():
    schedule = ConstantRate(warmup_images=1000)
    assert [schedule(n, 0.0) for n in (0, 250, 1000, 5000)] == [0.0, 0.25, 1.0, 1.0]


def test_cooldown_reaches_zero_at_the_end():
    schedule = ConstantRate(cooldown=0.2)
    assert schedule(1, 0.8) == pytest.approx(1.0)
    assert schedule(1, 0.9) == pytest.approx(0.5)
    assert schedule(1, 1.0) == 0.0


def test_cosine_goes_from_one_to_final():
    schedule = CosineDecay(final=0.1)
    assert schedule(1, 0.0) == 1.0
    assert schedule(1, 0.5) == pytest.approx(0.55)
    assert schedule(1, 1.0) == pytest.approx(0.1)


def test_the_inverse_square_root_counts_images_and_not_the_share_of_the_run():
    schedule = InverseSqrt(warmup_images=100, reference_images=1000)
    for progress in (0.0, 0.3, 1.0):
        rates = [schedule(images, progress) for images in (50, 100, 1000, 4000, 100_000)]
        assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.1])
