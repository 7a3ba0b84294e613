"""Seams, the spatial FID, and the FID on a classifier's features."""

import pytest
import torch
from helpers.refusals import refused
from helpers.tiny_data import tiny_data

from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.extractor import Classifier, EfficientNetLite0
from diffusion_lab.metrics.extractor.base import FEATURES, SPATIAL
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, save_classifier
from diffusion_lab.metrics.observer import edge_gradients
from diffusion_lab.metrics.reference import RealImages

SAMPLES = 24


def distance(ours: torch.Tensor, real: torch.Tensor) -> float:
    """The Fréchet distance by its textbook formula, from the eigenvalues of the covariances."""
    (m1, s1), (m2, s2) = ((each.double().mean(0), each.double().T.cov()) for each in (ours, real))
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root)


def images(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (SAMPLES, 1, 8, 8), generator=generator).to(torch.uint8)


def checkerboard(side: int, patch: int, rise: int = 0) -> torch.Tensor:
    """An image whose patches alternate between 0 and 100, with a rise from column to column."""
    patches = torch.arange(side) // patch
    board = 100 * ((patches[:, None] + patches[None]) % 2) + rise * torch.arange(side)
    return board[None, None].to(torch.uint8)


def test_edges_and_insides_of_patches_by_hand():
    across, inside = edge_gradients(checkerboard(8, 4), 4)[0].tolist()
    assert (across, inside) == (100, 0)
    ramp = torch.arange(8).expand(1, 1, 8, 8).to(torch.uint8)  # changes along rows, by 1 a pixel
    assert edge_gradients(ramp, 4)[0].tolist() == [0.5, 0.5]
    assert edge_gradients(checkerboard(8, 2), 4)[0].tolist() == [100, pytest.approx(100 / 3)]


def test_the_corner_moves_the_patches():
    """Images cropped from larger ones have their edges elsewhere."""
    cropped = checkerboard(16, 4)[:, :, 2:14, 1:13]
    assert edge_gradients(cropped, 4, (2, 1))[0].tolist() == [100, 0]
    assert edge_gradients(cropped, 4)[0, 1] > 0


@pytest.fixture
def prepared(tmp_path):
    torch.manual_seed(0)
    facts = {"shape": [1, 8, 8], "classes": list(tiny_data().class_names)}
    path = tmp_path / "classifier.safetensors"
    save_classifier(SmallClassifier((1, 8, 8), 4).eval(), path, facts)
    data = tiny_data(pad=12)
    metrics = GenerativeMetrics(
        EfficientNetLite0(), None, SAMPLES, str(tmp_path), 0, classifier=str(path), patch=4
    )
    metrics.load(data, "cpu")
    return PreparedMetrics.of(metrics, data), data, Classifier(str(path))


def measured(prepared, samples: torch.Tensor) -> dict[str, float]:
    return prepared.compute(prepared.metrics.observer(samples), torch.arange(len(samples)) % 4)


@pytest.mark.slow
def test_each_value_is_the_textbook_distance_of_its_own_features(prepared):
    prepared, data, classifier = prepared
    classifier.load("cpu")
    extractor, real = prepared.metrics.extractor, data.reference_images()
    values, count = measured(prepared, images()), len(real)
    by_classifier = distance(classifier(images()), classifier(real))
    name = f"{classifier.name}/train{count}-{SAMPLES}"
    assert values[f"classifier_fid/{name}"] == pytest.approx(by_classifier, rel=1e-4)
    ours, theirs = (extractor.outputs(each)[SPATIAL] for each in (images(), real))
    name = f"efficientnet_lite0-96/train{count}-{SAMPLES}"
    assert values[f"spatial_fid/{name}"] == pytest.approx(distance(ours, theirs), rel=1e-4)
    tests = data.test_images()[prepared.metrics.test_ids(data)]
    beside = distance(extractor.outputs(tests)[SPATIAL], theirs)
    assert values[f"spatial_fid_real/{name}"] == pytest.approx(beside, rel=1e-4)


def test_seams_are_those_of_the_padded_images_and_stand_beside_real_ones(prepared):
    """Images of 8 pixels in 12: patches of 4 begin two pixels before the image."""
    prepared, data, _ = prepared
    values = measured(prepared, images())
    across, inside = edge_gradients(images(), 4, (2, 2)).mean(0).tolist()
    assert values[f"seams/4px/{SAMPLES}"] == pytest.approx(across / inside)
    tests = data.test_images()[prepared.metrics.test_ids(data)]
    across, inside = edge_gradients(tests, 4, (2, 2)).mean(0).tolist()
    assert values[f"seams_real/4px/{SAMPLES}"] == pytest.approx(across / inside)


def test_a_second_measurement_reads_the_moments_from_the_cache(prepared, tmp_path, monkeypatch):
    first, data, _ = prepared
    expected = measured(first, images())
    metrics = GenerativeMetrics(
        EfficientNetLite0(),
        None,
        SAMPLES,
        str(tmp_path),
        0,
        classifier=str(tmp_path / "classifier.safetensors"),
        patch=4,
    )
    metrics.load(data, "cpu")
    monkeypatch.setattr(RealImages, "observe", None)
    assert measured(PreparedMetrics.of(metrics, data), images()) == expected


def test_features_are_those_without_the_map(prepared):
    extractor = prepared[0].metrics.extractor
    network = extractor.network[1].network
    with torch.no_grad():
        whole = network(extractor.network[0](images().expand(-1, 3, -1, -1)))
    torch.testing.assert_close(extractor.outputs(images())[FEATURES], whole, atol=1e-5, rtol=1e-4)


def test_patches_as_large_as_the_images_are_refused(tmp_path):
    metrics = GenerativeMetrics(EfficientNetLite0(), None, SAMPLES, str(tmp_path), patch=8)
    with refused("patch", by=ValueError):
        metrics.load(tiny_data(), "cpu")
