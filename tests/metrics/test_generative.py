import math
import re

import numpy as np
import pytest
import torch
from helpers.compositions import composed
from helpers.fake_metrics import FakeExtractor, FakeSource, generated, prepared, values_of
from helpers.ranks import on_ranks
from helpers.refusals import out_of_range, refused
from helpers.tiny_runs import same
from hydra.utils import instantiate

from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute.distributed import on_rank_zero, rank_and_world, shard
from diffusion_lab.metrics import GenerativeMetrics, Metric, PreparedMetrics
from diffusion_lab.metrics.distances import FeatureSet, frechet, kid
from diffusion_lab.metrics.extractor import EfficientNetLite0, Inception
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable
from diffusion_lab.metrics.observer import short_count
from diffusion_lab.metrics.quantity import (
    Quantity,
    ceiling,
    higher_is_better,
    quantity_of,
    report,
    side_by_side,
)

REFERENCE, REAL_VALUE = "fid/fake/train2k-100", "fid_real/fake/train2k-100"
COVERAGE = ("precision", "recall", "density", "coverage")


def test_a_reference_of_validation_images_has_another_name_and_protocol(tmp_path):
    source, train = FakeSource(), prepared(tmp_path)
    validation = prepared(tmp_path, reference="validation")
    values, extractor = values_of(validation), validation.metrics.extractor
    real = FeatureSet(extractor(source.validation_rows()[:]))
    tests = source.test[random_places(300, 100)]
    for kind, images in (("fid", generated()), ("fid_real", tests)):
        distance = frechet(FeatureSet(extractor(images)), real)
        assert values[f"{kind}/fake/val150-100"] == pytest.approx(distance, rel=1e-6)
    assert not set(values) & set(values_of(train))
    fewer = prepared(tmp_path, FakeSource(validation=140), reference="validation")
    protocols = [each.protocol for each in (train, validation, fewer)]
    assert len({protocol["fingerprint"] for protocol in protocols}) == 3
    assert [protocol["reference"] for protocol in protocols] == ["train"] + 2 * ["validation"]


def test_validation_images_that_there_are_not_are_refused(tmp_path):
    with refused("reference=validation", "data.validation_size", by=ValueError):
        prepared(tmp_path, FakeSource(validation=0), reference="validation")


def test_values_and_real_values_are_the_distances_by_name(tmp_path):
    metrics = prepared(tmp_path)
    source, extractor = FakeSource(), metrics.metrics.extractor
    values = values_of(metrics)
    real, fake = FeatureSet(extractor(source.train)), FeatureSet(extractor(generated()))
    names = ["fid", "fid_std", "fid_infinity", "kid"]
    expected = [f"{name}/fake/train2k-100" for name in names]
    expected += [f"{name}/fake/train100-100" for name in COVERAGE]
    real_values = [name.replace("/", "_real/", 1) for name in expected]
    assert list(values) == [*expected, *real_values]
    assert values[REFERENCE] == pytest.approx(frechet(fake, real), rel=1e-9)
    assert values["kid/fake/train2k-100"] == pytest.approx(kid(fake, real), rel=1e-9)
    assert values[REFERENCE] > 2 * values[REAL_VALUE] > 0
    everything = prepared(tmp_path, num_samples=300)
    test = FeatureSet(extractor(source.test))
    assert everything.real["fid_real/fake/train2k-300"] == pytest.approx(frechet(test, real))


def test_a_real_value_of_fewer_images_is_named_and_printed_so(tmp_path):
    metrics = prepared(tmp_path, num_samples=1000)
    values = values_of(metrics)
    assert "fid/fake/train2k-1k" in values
    assert "fid_real/fake/train2k-300" in values
    assert report(values)[1].endswith(" at 300 images  fid/fake/train2k-1k")


def test_report():
    values = {
        "fid/efficientnet_lite0-96/train10k-1k": 231.44,
        "fid_std/efficientnet_lite0-96/train10k-1k": 3.21,
        "kid/efficientnet_lite0-96/train10k-1k": 0.123456,
        "fid_real/efficientnet_lite0-96/train10k-1k": 97.09,
        "kid_real/efficientnet_lite0-96/train10k-1k": -0.00012,
        "accuracy/classifier-12345678/1k": 0.9,
    }
    assert report(values) == [
        "metric    value        real images  name",
        "FID       231.4 ± 3.2  97.09        fid/efficientnet_lite0-96/train10k-1k",
        "KID       0.1235       -0.00012     kid/efficientnet_lite0-96/train10k-1k",
        "Accuracy  0.9                       accuracy/classifier-12345678/1k",
    ]
    assert report({}) == []


def test_runs_stand_side_by_side_with_the_real_value_of_both():
    ours = {"fid/x/train2k-1k": 5.0, "fid_std/x/train2k-1k": 0.25, "fid_real/x/train2k-300": 2.0}
    ours |= {"kid/x/train2k-1k": 0.5, "kid_real/x/train2k-1k": 0.125, "accuracy/y/1k": 0.75}
    theirs = {name: 2 * value for name, value in ours.items() if "accuracy" not in name}
    table = side_by_side({"a": ours, "b": theirs})
    assert [column.header for column in table.columns] == ["metric", "a", "b", "real images"]
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("fid/x/train2k-1k", "5 ± 0.25", "10 ± 0.5", "2 at 300 images"),
        ("kid/x/train2k-1k", "0.5", "1", "0.125"),
    ]


def test_the_metrics_of_a_first_stage_are_those_of_one_protocol_or_all():
    values = {"fid/fake/train2k-1k": 5.0, "fid_real/fake/train2k-1k": 2.0}
    same = {"rfid/fake/train2k-1k": 3.0, "rfid_real/fake/train2k-1k": 2.0}
    other = {"rfid/fake/train2k-500": 4.0}
    assert ceiling(values, same | other | {"val/psnr": 30.0}) == same
    assert ceiling(values, other | {"val/psnr": 30.0}) == other
    assert report(values | other)[2].split() == ["rFID", "4", "rfid/fake/train2k-500"]


def test_report_calls_a_class_by_its_name():
    values = {
        "fid_class0/inception/train6k-500": 61.25,
        "fid_class1/inception/train6k-500": 62.5,
        "rfid_class1/inception/train6k-500": 30.0,
        "fid_class0_real/inception/train6k-300": 44.0,
        "fid_class1_real/inception/train6k-500": 43.0,
    }
    rows = [re.split("  +", line) for line in report(values, ("T-shirt/top", "1"))[1:]]
    assert rows == [
        ["FID of class 0 (T-shirt/top)", "61.25", "44 at 300 images", next(iter(values))],
        ["FID of class 1", "62.5", "43", "fid_class1/inception/train6k-500"],
        ["rFID of class 1", "30", "rfid_class1/inception/train6k-500"],
    ]
    assert report(values)[2].startswith("FID of class 1  ")


def per_class_values(folder, source, num_samples):
    metrics = prepared(folder, source, num_samples=num_samples, per_class=True)
    return metrics, values_of(metrics)


def test_the_real_value_of_a_class_is_of_as_many_test_images_of_it(tmp_path):
    source = FakeSource()
    # a third of the test images and half of the samples are of class 1
    source.test_labels = lambda: (torch.arange(300) % 3 == 0).long()
    metrics, values = per_class_values(tmp_path, source, 101)
    order = random_places(300, None)
    for label, count in ((0, 51), (1, 50)):
        name = f"fid_class{label}/fake/train1k-{count}"
        real, ours = source.train[label::2], generated(101)[label::2]
        theirs = source.test[order[source.test_labels()[order] == label][:count]]
        sides = [FeatureSet(metrics.metrics.extractor(images)) for images in (real, ours, theirs)]
        # the rounding of features depends on the batch
        assert values[name] == pytest.approx(frechet(sides[0], sides[1]), rel=1e-4)
        beside = values[name.replace("/", "_real/", 1)]
        assert beside == pytest.approx(frechet(sides[0], sides[2]), rel=1e-4)
    assert len([name for name in values if name.startswith("fid_class")]) == 4
    # metrics of all classes together are the same without per_class
    plain = values_of(prepared(tmp_path, source, num_samples=101))
    assert {name: values[name] for name in plain} == pytest.approx(plain, rel=1e-4)


def test_the_real_value_of_a_class_with_few_test_images_says_so(tmp_path):
    source = FakeSource()
    source.test_labels = lambda: (torch.arange(300) < 20).long()
    _, values = per_class_values(tmp_path, source, 100)
    real_values = [name for name in values if name.startswith("fid_class") and "_real" in name]
    assert real_values == ["fid_class0_real/fake/train1k-50", "fid_class1_real/fake/train1k-20"]
    lines = [line for line in report(values, FakeSource.class_names) if "of class" in line]
    assert " at " not in lines[0]
    assert "FID of class 1 (odd)" in lines[1]
    assert lines[1].endswith(" at 20 images  fid_class1/fake/train1k-50")


def test_short_count():
    counts = {2: "2", 999: "999", 1000: "1k", 1234: "1234", 60000: "60k", 1500: "1500"}
    assert {count: short_count(count) for count in counts} == counts


def test_subsets_of_the_reference_are_nested_shuffled_and_fixed(tmp_path):
    small, large = (prepared(tmp_path / "a", reference_size=size) for size in (200, 500))
    assert len(small.reference) == 200
    assert torch.equal(large.reference.features[:200], small.reference.features)
    again = prepared(tmp_path / "b", reference_size=200)
    assert torch.equal(again.reference.features, small.reference.features)
    in_order = small.metrics.extractor(FakeSource().train[:200])
    assert not torch.equal(small.reference.features, in_order)
    whole = prepared(tmp_path / "a", reference_size=9999)
    assert len(whole.reference) == 2000


def test_a_second_evaluation_reads_what_the_first_wrote(tmp_path):
    first = prepared(tmp_path)
    assert first.metrics.extractor.images_seen == 2100
    second = prepared(tmp_path)
    assert second.metrics.extractor.images_seen == 0
    assert values_of(second) == values_of(first)
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_changes_the_reference_computes_it_anew(tmp_path):
    prepared(tmp_path)
    other = FakeSource()
    other.fingerprint = "other data"
    for change, seen in (
        ({"source": other}, 2100),
        ({"weights": "b"}, 2100),
        ({"reference_size": 1999}, 2099),
        ({"num_samples": 101}, 101),  # only the test images
    ):
        assert prepared(tmp_path, **change).metrics.extractor.images_seen == seen


def cut(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda content: b""])
def test_a_damaged_cache_file_is_replaced(tmp_path, damage):
    expected = prepared(tmp_path).reference.statistics
    (path,) = tmp_path.glob("train2k-*.pt")
    path.write_bytes(damage(path.read_bytes()))
    metrics = prepared(tmp_path)
    assert metrics.metrics.extractor.images_seen == 2000
    assert torch.equal(metrics.reference.features, expected.features)
    assert same(metrics.reference.statistics.statistics(), expected.statistics())
    assert prepared(tmp_path).metrics.extractor.images_seen == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    metrics = prepared(tmp_path / "file" / "folder")
    assert "could not be written" in capsys.readouterr().err
    assert values_of(metrics)[REFERENCE] > 0


def test_an_unavailable_extractor_is_noticed_before_the_data_are_looked_at(tmp_path):
    class Unavailable(FakeExtractor):
        def build(self):
            raise ExtractorUnavailable("no weights")

    metrics = GenerativeMetrics(Unavailable(), None, 100, str(tmp_path / "cache"))
    with pytest.raises(ExtractorUnavailable):
        metrics.load(object(), "cpu")
    assert not (tmp_path / "cache").exists()


def test_bad_numbers_are_refused(tmp_path):
    metrics = prepared(tmp_path)
    with refused("num_samples=100", 99, by=ValueError):
        metrics.compute({"features": torch.zeros(99, 12)}, None)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("num_samples", [1, None, "5k", 5e3, True, math.nan]),
        ("reference_size", [1, False, "all"]),
        ("half_splits", [-1, 2.5, None, True]),
        ("per_class", [3, "yes", None]),
    ],
)
def test_settings_of_a_wrong_kind_are_named(argument, values):
    known = {"extractor": None, "reference_size": None, "num_samples": 100, "cache_dir": ""}
    for value in values:
        with out_of_range(argument):
            GenerativeMetrics(**known | {argument: value})


class Spread(Metric):
    """The spread of samples relative to that of reference images."""

    quantities = (Quantity("spread", "Spread", "the ratio of two spreads", True, percent=True),)

    def measure(self, generated, reference):
        ours, theirs = (images.features.std(0).mean() for images in (generated, reference))
        return {"spread": (ours / theirs).item()}


def test_a_metric_of_other_code_is_measured_named_and_printed_like_ours(tmp_path):
    metrics = prepared(tmp_path, extra={"mine": Spread()})
    values = values_of(metrics)
    assert values["spread/fake/train2k-100"] > 0
    assert values["spread_real/fake/train2k-100"] == pytest.approx(1, abs=0.2)
    lines = report(values, extra=metrics.metrics.extra_quantities)
    assert [line for line in lines if line.startswith("Spread  ")]
    assert metrics.metrics.extra_facts[0]["higher_is_better"]
    seen = prepared(tmp_path, extra={"mine": Spread()}).metrics.extractor.images_seen
    assert seen == 0  # the cached values are read


@pytest.mark.parametrize("kind", [torch.tensor, np.float32])
def test_values_of_a_metric_of_other_code_may_be_tensors(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Spread, "measure", lambda *_: {"spread": kind(0.5)})
    values = values_of(prepared(tmp_path, extra={"mine": Spread()}))
    assert {type(value) for value in values.values()} == {float}
    assert values["spread/fake/train2k-100"] == 0.5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"spread": torch.ones(3)}, ("spread", "(3,)")),
        ({"spread": np.ones(2)}, ("spread", "(2,)")),
        ({"spread": None}, ("spread", "NoneType")),
        (torch.ones(()), ("spread", "Tensor")),
        (None, ("NoneType",)),
    ],
)
def test_a_metric_whose_values_are_no_numbers_is_refused(tmp_path, monkeypatch, values, named):
    monkeypatch.setattr(Spread, "measure", lambda *_: values)
    with refused("Spread.measure", *named):
        prepared(tmp_path, extra={"mine": Spread()})
    assert not list(tmp_path.glob("real-*"))


def test_a_quantity_whose_name_ends_in_a_number_is_no_other_quantity_of_a_class():
    own = [
        Quantity("top5", "Top 5", "labels among the first five", True),
        Quantity("top", "Top", "labels that come first", False),
    ]
    for quantity in own:
        assert quantity_of(f"{quantity.name}/fake/train2k-100", own) is quantity
        _, line = report({f"{quantity.name}/fake/train2k-100": 0.5}, ["a"] * 9, own)
        assert line.startswith(f"{quantity.title} ")
    assert higher_is_better("top5/fake/train2k-100", own[:1])
    assert higher_is_better("rtop5/fake/train2k-100", own)
    assert quantity_of("fid_class4/fake/train2k-100", own) is quantity_of("fid_class")
    assert quantity_of("rfid/fake/train2k-100", own) is quantity_of("fid")


class Similarity(Metric):
    """A metric with a product in float32, which autocast would round."""

    quantities = (Quantity("similarity", "Similarity", "mean product of features", True),)

    def measure(self, generated, reference):
        return {"similarity": (generated.features @ reference.features.T).mean().item()}


def test_autocast_does_not_reach_a_metric_of_other_code(tmp_path):
    metrics = prepared(tmp_path, extra={"mine": Similarity()})
    outside = values_of(metrics)
    with torch.autocast("cpu", torch.bfloat16):
        assert values_of(metrics) == outside


def evaluate_on_rank(rank, cache):
    """The values of a rank, and the images that it sees in a first and in a second measurement."""
    if rank:  # only rank 0 may do the expensive part

        def refuse(*_):
            raise AssertionError(f"rank {rank} computes metrics")

        GenerativeMetrics.results = FeatureSet.statistics = refuse
    metrics = prepared(cache, num_samples=101, per_class=True)
    mine = shard(101, *rank_and_world())
    observer = metrics.metrics.observer
    observed = observer(generated(101)[mine])
    seen = observer.extractor.images_seen
    values = metrics.compute(observer.gather([observed]), torch.arange(101) % 2)
    again = prepared(cache, num_samples=101, per_class=True)
    return values, seen, again.metrics.extractor.images_seen


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_with_uneven_shards_give_what_one_gives(tmp_path, world):
    metrics = prepared(tmp_path / "single", num_samples=101, per_class=True)
    expected = values_of(metrics)
    beside = metrics.metrics.extractor.images_seen - 2000 - 101
    total = 0
    for values, seen, again in on_ranks(world, tmp_path, evaluate_on_rank, tmp_path / "cache"):
        assert values == pytest.approx(expected, rel=1e-6)
        assert again == 0
        total += seen
    assert total == 2000 + beside + 101  # no image is seen twice
    assert len(list((tmp_path / "cache").iterdir())) == 2


class Strange(Exception):
    """An exception that cannot be rebuilt from its message alone, as pickle would do."""

    def __init__(self, place, reason):
        super().__init__(f"{place}: {reason}\nand more lines")


def stop_on_rank(rank, cache):
    """The errors that each of two processes receives when rank 0 cannot go on."""
    heard = []

    def fails(error):
        raise error

    def listen(call):
        try:
            heard.append(call())
        except Exception as error:
            heard.append((type(error).__name__, str(error)))

    listen(lambda: on_rank_zero(lambda: rank + 1))
    listen(lambda: on_rank_zero(lambda: fails(Strange("here", "no"))))
    listen(lambda: on_rank_zero(lambda: fails(MemoryError())))
    metrics = prepared(cache)
    features = metrics.metrics.observer(generated())["features"]
    features[3] = math.nan
    listen(lambda: metrics.compute({"features": features}, None))
    metrics = metrics.metrics
    metrics.num_samples = 99  # needs other real values, whose features are not finite
    metrics.extractor.network.weight.fill_(math.nan)
    metrics.load = lambda *_: None
    listen(lambda: PreparedMetrics.of(metrics, FakeSource()))
    return heard


@pytest.mark.slow
def test_what_stops_the_first_rank_is_heard_by_all(tmp_path):
    first, second = on_ranks(2, tmp_path, stop_on_rank, tmp_path / "cache")
    assert first[0] == second[0] == 1
    assert first[1] == ("Strange", "here: no\nand more lines")
    assert first[2] == ("MemoryError", "")
    bad = "1 of 100 images have features that are not finite"
    beside = "99 of 99 images have features that are not finite"
    assert [kind for kind, _ in first[3:]] == ["UserError"] * 2
    assert first[3][1].startswith(bad)
    assert first[4][1].startswith(beside)
    reasons = ["here: no", "MemoryError", bad, beside]
    for (kind, words), reason in zip(second[1:], reasons, strict=True):
        assert kind == "FirstStopped"
        assert words.startswith(f"the first process stopped: {reason}")
        assert "\n" not in words


@pytest.mark.parametrize(
    ("choice", "extractor"), [("efficientnet_lite0", EfficientNetLite0), ("inception", Inception)]
)
def test_configurations_build(choice, extractor):
    metrics = instantiate(composed(None, f"+metrics={choice}", "+data.source.root=/data").metrics)
    other = composed(None, f"+metrics={choice}", "metrics/extractor=inception")
    assert isinstance(metrics.extractor, extractor)
    assert metrics.cache_dir == "/data/reference"
    assert metrics.reference_size is None
    assert isinstance(instantiate(other.metrics.extractor), Inception)
