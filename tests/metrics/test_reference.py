"""A reference in a file: images or statistics in an .npz, of which nothing is run."""

import numpy as np
import pytest
import torch
from helpers.reduced import Reduced
from helpers.refusals import refused
from helpers.tiny_data import TinyData, tiny_data
from torch import nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from diffusion_lab.common.randomness import random_places
from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.distances import FeatureSet, Moments, covariance_root, frechet, mind, mmd
from diffusion_lab.metrics.extractor.base import FeatureExtractor
from diffusion_lab.metrics.likelihood_divergence import fld

DIM = 10
BOMB = Reduced(open, "exploded", "w")


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, DIM, generator=generator) / 8)

    def forward(self, images):
        return (images.float().flatten(1) / 255 @ self.weight).tanh()


class Projected(FeatureExtractor):
    name, dim, channels, preprocessing = "fake", DIM, 1, "x / 255"

    def build(self):
        return Projection(), "a"

    def logits(self, features):
        return 5 * features  # as if the features were classes


@pytest.fixture
def data():
    found = tiny_data()
    found.setup("fit")
    return found


@pytest.fixture
def measured(data, tmp_path):
    """A function: measured(images, reference=...) -> the values and the protocol."""

    def measure(images, labels=None, **options):
        metrics = GenerativeMetrics(Projected(), None, len(images), str(tmp_path), **options)
        metrics.load(data, "cpu")
        prepared = PreparedMetrics.of(metrics, data)
        return prepared.compute(metrics.observer(images), labels), prepared.protocol

    return measure


@pytest.fixture
def measured_by(measured, tmp_path):
    """A function: measured_by(name=array, ...) -> values and protocol by a file of these arrays."""

    def measure(**arrays):
        np.savez(tmp_path / "file.npz", **arrays)
        return measured(samples(), reference=str(tmp_path / "file.npz"))

    return measure


@pytest.fixture
def features():
    """A function: the features of images, (n, D)."""
    extractor = Projected()
    extractor.load("cpu")
    return extractor


def samples(count: int = 40) -> torch.Tensor:
    images = TinyData().load()[0].images[:count].clone()
    return images // 2 + 40


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
    rows = features.double().numpy()
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def by_kind(values: dict[str, float]) -> dict[str, float]:
    return {name.partition("/")[0]: value for name, value in values.items()}


def test_statistics_of_the_training_images_give_their_fid_and_no_other_distance(
    data, measured, measured_by, features
):
    usual, _ = measured(samples())
    found, protocol = measured_by(**statistics(features(data.reference_images())))
    for kind in ("fid", "fid_real", "fid_std", "fid_infinity"):
        count = 32 if kind == "fid_real" else 40
        name = f"{kind}/fake/stats-{protocol['reference_file']}-{count}"
        assert found[name] == pytest.approx(by_kind(usual)[kind], rel=1e-6)
    # a score without a reference stays
    assert set(by_kind(found)) == {
        *("fid", "fid_std", "fid_infinity", "fid_real", "fid_infinity_real", "fid_std_real"),
        *("inception_score", "inception_score_real"),
    }


def test_statistics_of_a_map_give_its_distance(data, measured_by, features, monkeypatch):
    monkeypatch.setattr(Projected, "dim", 4)  # the other six numbers are a map
    monkeypatch.setattr(Projected, "spatial_dim", 6)
    monkeypatch.setattr(Projected, "logits", lambda *_: None)
    extractor = Projected()
    extractor.load("cpu")
    given, ours = (
        extractor.outputs(each)["spatial"].double() for each in (data.test_images(), samples())
    )
    of_map = statistics(given)
    known = statistics(features(data.reference_images()))
    found, protocol = measured_by(**known, mu_s=of_map["mu"], sigma_s=of_map["sigma"])
    moments = Moments(given.mean(0), covariance_root(given.T.cov()))
    name = f"spatial_fid/fake/stats-{protocol['reference_file']}-40"
    assert found[name] == pytest.approx(frechet(FeatureSet(ours), moments), rel=1e-5)
    of_another, _ = measured_by(**known, mu_s=np.zeros(5), sigma_s=np.eye(5))
    assert "spatial_fid" not in by_kind(of_another)


@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_images_in_a_file_are_a_reference_like_the_training_images(
    data, measured, measured_by, name
):
    usual, protocol = measured(samples())
    found, other = measured_by(**{name: channels_last(data.reference_images())})
    assert list(found.values()) == pytest.approx(list(usual.values()), rel=1e-6)
    assert other["reference_images"] == protocol["reference_images"] == 84
    assert f"fid/fake/file-{other['reference_file']}-84-40" in found
    assert other["fingerprint"] != protocol["fingerprint"]


def test_of_a_batch_with_both_fid_takes_the_statistics_and_the_rest_the_images(
    data, measured, measured_by, features
):
    half = channels_last(data.reference_images()[:50])
    known = statistics(features(data.reference_images()))
    usual, _ = measured(samples())
    of_half, _ = measured_by(arr_0=half)
    found, protocol = measured_by(arr_0=half, mu_s=np.zeros(3), sigma_s=np.eye(3), **known)
    checksum, fid = protocol["reference_file"], usual["fid/fake/train84-40"]
    assert found[f"fid/fake/stats-{checksum}-40"] == pytest.approx(fid, rel=1e-6)
    halves = by_kind(of_half)
    for kind, count in (("kid", 50), ("precision", 40), ("coverage", 40)):
        assert found[f"{kind}/fake/file-{checksum}-{count}-40"] == pytest.approx(halves[kind])


def test_statistics_of_other_features_are_refused_and_images_beside_them_used(
    data, measured_by, capsys
):
    other = {"mu": np.zeros(DIM + 1), "sigma": np.eye(DIM + 1)}
    with refused("reference=", "file.npz", DIM + 1, DIM, by=ValueError):
        measured_by(**other)
    found, _ = measured_by(arr_0=channels_last(data.reference_images()), **other)
    assert str(DIM + 1) in capsys.readouterr().err
    assert "kid" in by_kind(found)
    assert any(name.startswith("fid/fake/file-") for name in found)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.array([BOMB], dtype=object), "sigma": np.eye(1)},
        {"arr_0": np.array([BOMB], dtype=object)},
        {"mu": np.zeros(DIM)},
        {"features": np.zeros((5, DIM))},
        {"mu": np.zeros(DIM), "sigma": np.eye(DIM - 1)},
        {"mu": np.zeros(DIM), "sigma": np.zeros(DIM)},
        {"mu": np.full(DIM, np.nan), "sigma": np.eye(DIM)},
        {"mu": np.zeros(DIM), "sigma": np.triu(np.ones((DIM, DIM)))},
        {"arr_0": np.zeros((9, 8, 8, 3), np.uint8)},
        {"arr_0": np.zeros((9, 8, 8, 1))},
    ],
    ids=lambda arrays: " ".join(f"{k}{v.shape}" for k, v in arrays.items()),
)
def test_other_files_are_refused_and_no_code_in_them_is_run(
    measured_by, tmp_path, monkeypatch, arrays
):
    monkeypatch.chdir(tmp_path)
    with refused(f"reference={tmp_path / 'file.npz'}", by=ValueError):
        measured_by(**arrays)
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_npz_is_refused(measured, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    (tmp_path / "a.pkl").write_bytes(b"nothing")
    for name in ("a.npz", "a.pkl", "nowhere.npz", "trian"):
        with refused(name, by=ValueError):
            measured(samples(), reference=str(tmp_path / name))
    with refused("per_class", "reference=", by=ValueError):
        measured(samples(), torch.arange(40) % 4, reference="trian", per_class=True)


def test_values_from_files_are_torch_fidelitys(data, measured_by, features):
    real, ours = features(data.reference_images()).double(), features(samples()).double()
    known = statistics(real)
    values, _ = measured_by(arr_0=channels_last(data.reference_images()), **known)
    found = by_kind(values)
    sides = [known, statistics(ours)]
    fid = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert found["fid"] == pytest.approx(fid, rel=1e-6)
    isc = isc_features_to_metric(features.logits(ours), splits=10, shuffle=False)
    assert found["inception_score"] == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    # theirs takes subsets of equal size of both sides: here of all samples, many times
    subsets = {"kid_subsets": 2000, "kid_subset_size": 40, "verbose": False}
    theirs = kid_features_to_metric(ours, real, **subsets)
    spread = theirs["kernel_inception_distance_std"] / 2000**0.5
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=5 * spread)


def test_mmd_mind_and_fld_are_measured_on_request(data, measured, features):
    usual, protocol = measured(samples())
    asked = {"mmd": True, "mind": True, "fld": True}
    found, same = measured(samples(), **asked)
    again, _ = measured(samples(), **asked)  # read from the cache
    assert found == pytest.approx(again)
    assert same == protocol
    assert set(found) - set(usual) == {
        *("mmd/fake/train84-40", "mmd_real/fake/train84-32"),
        *("mind/fake/train84-40", "mind_real/fake/train84-32"),
        "fld/fake/train84-40",  # of real images it is 0 by definition
    }
    train, test = (features(images) for images in (data.reference_images(), data.test_images()))
    real, ours = FeatureSet(train), FeatureSet(features(samples()))
    assert found["mmd/fake/train84-40"] == pytest.approx(mmd(ours, real), rel=1e-5)
    train, test = (rows[random_places(len(rows), None)] for rows in (train, test))
    expected = mind(ours, FeatureSet(train))
    assert found["mind/fake/train84-40"] == pytest.approx(expected, rel=1e-5)
    expected = fld(ours.features, train, test)
    assert found["fld/fake/train84-40"] == pytest.approx(expected, rel=1e-3)
