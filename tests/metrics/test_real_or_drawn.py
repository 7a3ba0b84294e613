"""The real-or-drawn test: chance for real images, certainty for what differs, in any loop."""

import pytest
import torch
from helpers.fake_metrics import FakeSource, generated, prepared

from diffusion_lab.metrics.built_in import told_apart

CPU = torch.device("cpu")


def shades(count: int, seed: int, low: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 1, 8, 8)
    return torch.randint(low, 200 + low, shape, generator=draw).to(torch.uint8)


def test_equal_distributions_are_told_apart_by_chance_alone():
    pairs = [(shades(400, seed), shades(400, seed + 1)) for seed in (0, 2)]
    # three standard deviations of the share of 800 guesses
    assert told_apart(*pairs, CPU) == pytest.approx(0.5, abs=3 * 0.5 / 800**0.5)


def test_what_differs_is_told_apart_on_images_that_were_not_learned():
    pairs = [(shades(400, seed), shades(400, seed + 1, low=50)) for seed in (0, 2)]
    assert told_apart(*pairs, CPU) > 0.95


def test_the_answer_is_the_same_again_and_leaves_the_generator_alone():
    pairs = [(shades(100, seed), shades(100, seed + 1, low=10)) for seed in (0, 2)]
    torch.manual_seed(3)
    with torch.inference_mode():
        first = told_apart(*pairs, CPU)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert told_apart(*pairs, CPU) == first


def test_it_is_measured_on_request_beside_test_images(tmp_path):
    metrics = prepared(tmp_path, FakeSource(train=200, test=60), real_or_drawn=True)
    values = metrics.compute(metrics.metrics.observer(generated()), None)
    kinds = [name.partition("/cnn/")[0] for name in values if "/cnn/" in name]
    assert kinds == ["real_or_drawn", "real_or_drawn_real"]
