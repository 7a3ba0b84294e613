"""The real-or-drawn test, FLD, the FID of each class, and the order of sane values."""

import math
import runpy
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_metrics import FakeSource, prepared, values_of
from helpers.paths import ROOT
from torch import nn

from diffusion_lab.metrics.built_in import ClassFID, told_apart
from diffusion_lab.metrics.likelihood_divergence import fitted, fld, surprise
from diffusion_lab.metrics.observer import ImageSet, place_in_class

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
    variances = fitted(centre, images, "")
    spread = (images - centre).square().sum(1).mean().item() / DIM
    assert variances.item() == pytest.approx(spread, rel=0.02)
    expected = (math.log(2 * math.pi * spread) + 1) / 2
    assert surprise(images, centre, variances) == pytest.approx(expected, rel=0.01)


def test_a_fit_raises_the_likelihood_of_training_images():
    before, after = torch.ones(COUNT), fitted(FRESH, TRAINING, "")
    assert surprise(TRAINING, FRESH, after) < surprise(TRAINING, FRESH, before)


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
    shares = [torch.cat([TRAINING[:copies], FRESH[copies:]]) for copies in (0, 60, 200, 285)]
    values = [divergence(samples) for samples in shares]
    assert values == sorted(values)
    assert values[-1] > values[0] + 5


def test_features_that_never_vary_count_for_nothing():
    few = FRESH[:60], TRAINING[:200], TEST[:100]
    assert math.isfinite(fld(*(nn.functional.pad(each, (0, 2), value=3.0) for each in few)))


CPU = torch.device("cpu")


def pairs_of_shades(count: int, lighter: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two pairs of sets of images; the second set of each is lighter."""

    def shades(seed: int, low: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(low, 200 + low, (count, 1, 8, 8), generator=draw).to(torch.uint8)

    return [(shades(seed, 0), shades(seed + 1, lighter)) for seed in (0, 2)]


@pytest.mark.long
def test_only_what_differs_is_told_apart_on_images_that_were_not_learned():
    # three standard deviations of the share of 800 guesses
    by_chance = pytest.approx(0.5, abs=3 * 0.5 / 800**0.5)
    assert told_apart(*pairs_of_shades(400, 0), CPU) == by_chance
    assert told_apart(*pairs_of_shades(400, 50), CPU) > 0.95


def test_the_answer_is_the_same_again_and_leaves_the_generator_alone():
    pairs = pairs_of_shades(100, 10)
    torch.manual_seed(3)
    with torch.inference_mode():
        first = told_apart(*pairs, CPU)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert told_apart(*pairs, CPU) == first


def test_it_is_measured_on_request_beside_test_images(tmp_path):
    metrics = prepared(tmp_path, FakeSource(train=200, test=60), real_or_drawn=True)
    kinds = [name.partition("/cnn/")[0] for name in values_of(metrics) if "/cnn/" in name]
    assert kinds == ["real_or_drawn", "real_or_drawn_real"]


def test_the_place_in_the_class():
    assert place_in_class(torch.tensor([1, 0, 1, 1, 0, 2])).tolist() == [0, 0, 1, 2, 1, 0]


def labelled(seed: int, *counts: int) -> ImageSet:
    """An image set with `counts` images of classes 0, 1, ..., shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = torch.randn(len(labels), 5, generator=generator)
    return ImageSet(SimpleNamespace(name="x", compares_on="cpu"), features, labels)


def both(generated: ImageSet, test: ImageSet, reference: ImageSet) -> dict[str, float]:
    """The FID of each class of samples, and that of equally many test images."""
    beside = test.matching(generated.labels)
    return ClassFID().results(generated, reference) | ClassFID().results(beside, reference, "_real")


def test_a_class_of_one_image_has_no_figure():
    values = both(labelled(2, 9, 9, 1), labelled(1, 9, 1, 9), labelled(0, 9, 9, 9))
    assert sorted(values) == [
        "fid_class0/x/train9-9",
        "fid_class0_real/x/train9-9",
        "fid_class1/x/train9-9",
    ]
    assert both(labelled(2, 9), labelled(1, 9), labelled(0, 1)) == {}


SANITY = runpy.run_path(str(ROOT / "experiments/metrics/sanity.py"))


def test_dropped_classes_are_replaced_by_fresh_images_of_the_others():
    images = torch.arange(400).reshape(-1, 1, 1, 1)
    labels = torch.arange(400) % 10
    unused = images + 1000, labels
    for classes in (1, 5):
        changed, classified = SANITY["without"](unused, classes, images[:200], labels[:200])
        assert len(changed) == len(classified) == len(changed.unique()) == 200
        assert classified.unique().tolist() == list(range(classes, 10))
        assert torch.equal(changed.flatten() % 10, classified)
        kept = images[:200][labels[:200] >= classes].flatten()
        assert torch.isin(kept, changed).all()
