"""The classifier that metrics use: its training command, its file, and the metrics it gives."""

import pytest
import torch
from helpers.refusals import refused
from helpers.tiny_data import TinyData, tiny_data
from helpers.tiny_runs import tiny_classifier
from safetensors.torch import save_file
from torch_fidelity.metric_isc import isc_features_to_metric

from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.built_in import inception_score
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, save_classifier

FACTS = {"shape": [1, 8, 8], "classes": list(TinyData.class_names)}


@pytest.fixture
def saved(tmp_path):
    return tiny_classifier(tmp_path / "classifier.safetensors")


def loaded(path) -> Classifier:
    classifier = Classifier(str(path))
    classifier.load("cpu")
    classifier.check(tiny_data())
    return classifier


def prepared_by(path, tmp_path) -> PreparedMetrics:
    """The metrics on a classifier's features, which it also judges."""
    options = {"per_class": True, "classifier": str(path)}
    metrics = GenerativeMetrics(loaded(path), None, 32, str(tmp_path / "cache"), **options)
    metrics.load(tiny_data(), "cpu")
    return PreparedMetrics.of(metrics, tiny_data())


def test_features_lie_before_the_head(saved):
    torch.manual_seed(0)  # as the file has it
    network = SmallClassifier((1, 8, 8), 4).eval()
    images, classifier = tiny_data().test_images(), loaded(saved)
    features = classifier(images)
    assert features.shape == (32, 128)
    torch.testing.assert_close(features, network(images))
    torch.testing.assert_close(classifier.logits(features), network.head(features))


def test_features_and_logits_are_float32_within_autocast(saved):
    classifier, images = loaded(saved), tiny_data().test_images()
    features = classifier(images)
    logits = classifier.logits(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(images), features)
        assert torch.equal(classifier.logits(features), logits)  # equal in dtype too
    assert logits.dtype == torch.float32


def test_log_probabilities_are_those_of_the_logits_and_have_gradients(saved):
    classifier, images = loaded(saved), tiny_data().test_images()[:5]
    labels = torch.tensor([0, 1, 2, 3, 0])
    expected = classifier.logits(classifier(images)).log_softmax(1)[range(5), labels]
    x0 = (images / 127.5 - 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = classifier.log_probability(x0, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (slope,) = torch.autograd.grad(found.sum(), x0)
    assert slope.abs().sum() > 0
    wide = torch.nn.functional.pad(x0.detach(), [2] * 4)  # a padded image is cropped
    torch.testing.assert_close(classifier.log_probability(wide, labels), found.detach())


def test_samples_measured_within_autocast_have_the_reference_values_of_the_same_images(
    saved, tmp_path
):
    """Test images in place of samples, which evaluations draw and measure under autocast."""
    prepared = prepared_by(saved, tmp_path)
    chosen = prepared.metrics.test_ids(tiny_data())
    images, labels = tiny_data().test_images()[chosen], tiny_data().test_labels()[chosen]
    with torch.autocast("cpu", torch.bfloat16):
        values = prepared.compute(prepared.metrics.observer(images), labels)
    samples = {name: value for name, value in values.items() if "_real/" not in name}
    assert {name.partition("/")[0] for name in samples} > {"accuracy", "inception_score", "fid"}
    for name, value in samples.items():
        assert value == pytest.approx(values[name.replace("/", "_real/", 1)], rel=1e-9, abs=1e-9)


def test_the_name_is_of_the_weights(saved, tmp_path):
    other = tmp_path / "other.safetensors"
    save_classifier(SmallClassifier((1, 8, 8), 4), other, FACTS)
    names = {loaded(path).name for path in (saved, other)}
    assert len(names) == 2
    assert all(len(name) == len("classifier-01234567") for name in names)


@pytest.mark.parametrize(
    "facts",
    [FACTS | {"shape": [1, 12, 12]}, FACTS | {"classes": ["first", "second", "third", "last"]}],
)
def test_a_classifier_of_other_data_is_refused(tmp_path, facts):
    path = tmp_path / "c.safetensors"
    save_classifier(SmallClassifier(tuple(facts["shape"]), 4), path, facts)
    with refused(path, "train-extractor", by=ExtractorUnavailable):
        loaded(path)


def test_a_missing_damaged_or_foreign_file_is_one_sentence(tmp_path, saved):
    with refused(tmp_path / "none", "train-extractor", by=ExtractorUnavailable):
        loaded(tmp_path / "none")
    saved.write_bytes(saved.read_bytes()[:1000])
    with refused(saved, by=ExtractorUnavailable):
        loaded(saved)
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with refused(tmp_path / "foreign", by=ExtractorUnavailable):
        loaded(tmp_path / "foreign")


def test_the_inception_score_is_torch_fidelitys():
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_the_inception_score_runs_from_one_to_the_number_of_classes():
    certain = torch.eye(5).repeat(20, 1) * 100
    assert inception_score(certain) == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.zeros(50, 5)) == pytest.approx(1)
    assert inception_score(torch.zeros(1, 5)) == pytest.approx(1)


def test_the_command_trains_one_that_metrics_use(lab, refusal, tmp_path):
    settings = ["epochs=12", "batch_size=16", "output=c/x"]
    arguments = ["data.source._target_=helpers.tiny_data.TinyData", *settings]
    result = lab.result("train-extractor", *arguments)
    assert result["test_accuracy"] == 1  # a bright bar marks the class
    metrics, labels = prepared_by("c/x", tmp_path), tiny_data().test_labels()
    observed = metrics.metrics.observer(tiny_data().test_images())
    right, wrong = (metrics.compute(observed, each) for each in (labels, (labels + 1) % 4))
    name = result["name"]
    assert right[f"accuracy/{name}/32"] == 1
    assert right[f"accuracy_real/{name}/32"] == 1
    assert 3 < right[f"inception_score/{name}/32"] <= 4
    assert wrong[f"accuracy/{name}/32"] == 0
    of_class = f"fid_class2/{name}/train21-8"
    assert wrong[of_class] > 10 * right[of_class] > 0

    before = (tmp_path / "c/x").read_bytes()
    assert "c/x" in refusal("train-extractor", *arguments)
    assert (tmp_path / "c/x").read_bytes() == before


def test_what_needs_labels_is_refused_without_them():
    metrics = GenerativeMetrics(Classifier("x"), None, 32, "", per_class=True)
    with refused("classes", by=ValueError):
        metrics.check(False, 4)
    with refused("per_class", "17 classes", by=ValueError):
        metrics.check(True, 17)
    metrics.check(True, 16)
    judged = GenerativeMetrics(Classifier("x"), None, 32, "", classifier="x")
    with refused("classes", by=ValueError):
        judged.check(False, 4)
