import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from diffusion_lab.distributed import rank_and_world, shard
from diffusion_lab.errors import UserError
from diffusion_lab.metrics import (
    ExtractorUnavailable,
    FeatureExtractor,
    FeatureSet,
    GenerativeMetrics,
    frechet,
    kid,
    report,
)
from diffusion_lab.metrics.extractor import EfficientNetLite0, Inception
from diffusion_lab.metrics.generative import short_count

REFERENCE, FLOOR = "fid/fake/train2k-100", "fid_floor/fake/train2k-100"
COVERAGE = ("precision", "recall", "density", "coverage")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, 12, generator=generator) / 7)

    def forward(self, images):
        return (images.float().flatten(1) / 255 @ self.weight).tanh()


class FakeExtractor(FeatureExtractor):
    name, dim, preprocessing = "fake", 12, "x / 255"

    def __init__(self, weights="a"):
        self.weights = weights
        self.images_seen = 0

    def build(self):
        return Network(), self.weights

    def __call__(self, images):
        self.images_seen += len(images)
        return super().__call__(images)


class FakeSource:
    fingerprint = "data"
    native_shape = (1, 4, 4)
    class_names = ("even", "odd")

    def __init__(self, train=2000, test=300):
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (train + test, 1, 4, 4), generator=generator)
        self.train, self.test = images.to(torch.uint8).split([train, test])

    def reference_images(self):
        return self.train

    def reference_labels(self):
        return torch.arange(len(self.train)) % 2

    def test_images(self):
        return self.test

    def test_labels(self):
        return torch.arange(len(self.test)) % 2


def prepared(folder, source=None, reference_size=None, num_samples=100, weights="a", **options):
    extractor = FakeExtractor(weights)
    metrics = GenerativeMetrics(extractor, reference_size, num_samples, str(folder), **options)
    metrics.prepare(source or FakeSource(), "cpu")
    return metrics


def figures(metrics, images):
    labels = torch.arange(len(images)) % 2
    return metrics.compute(metrics.observe(images), labels)


def generated(count=100):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(50, 256, (count, 1, 4, 4), generator=generator).to(torch.uint8)


def test_values_and_floors_are_the_distances_by_name(tmp_path):
    metrics = prepared(tmp_path)
    source, extractor = FakeSource(), metrics.extractor
    values = figures(metrics, generated())
    real = FeatureSet.of(extractor(source.train))
    fake = FeatureSet.of(extractor(generated()))
    names = ["fid", "kid", "fid_std", "fid_infinity"]
    expected = [f"{name}/fake/train2k-100" for name in names]
    expected += [f"{name}/fake/train100-100" for name in COVERAGE]
    floors = [name.replace("/", "_floor/", 1) for name in expected]
    assert list(values) == [*expected, *floors]
    assert values[REFERENCE] == pytest.approx(frechet(fake, real), rel=1e-9)
    assert values["kid/fake/train2k-100"] == pytest.approx(kid(fake, real), rel=1e-9)
    assert values[REFERENCE] > 2 * values[FLOOR] > 0
    everything = prepared(tmp_path, num_samples=300)
    test = FeatureSet.of(extractor(source.test))
    assert everything.floor["fid_floor/fake/train2k-300"] == pytest.approx(frechet(test, real))


def test_a_floor_of_fewer_images_is_named_and_printed_so(tmp_path):
    metrics = prepared(tmp_path, num_samples=1000)
    values = figures(metrics, generated(1000))
    assert "fid/fake/train2k-1k" in values
    assert "fid_floor/fake/train2k-300" in values
    assert "at 300 images) [fid/fake/train2k-1k]" in report(values)[0]


def test_report():
    values = {
        "fid/efficientnet_lite0-96/train10k-1k": 231.44,
        "fid_std/efficientnet_lite0-96/train10k-1k": 3.21,
        "kid/efficientnet_lite0-96/train10k-1k": 0.123456,
        "fid_floor/efficientnet_lite0-96/train10k-1k": 97.09,
        "kid_floor/efficientnet_lite0-96/train10k-1k": -0.00012,
        "accuracy/classifier-12345678/1k": 0.9,
    }
    assert report(values) == [
        "FID 231.4 ± 3.2 (real images 97.09) [fid/efficientnet_lite0-96/train10k-1k]",
        "KID 0.1235 (real images -0.00012) [kid/efficientnet_lite0-96/train10k-1k]",
        "Conditional accuracy 0.9 [accuracy/classifier-12345678/1k]",
    ]


def test_short_count():
    counts = {2: "2", 999: "999", 1000: "1k", 1234: "1234", 60000: "60k", 1500: "1500"}
    assert {count: short_count(count) for count in counts} == counts


def test_subsets_of_the_reference_are_nested_shuffled_and_fixed(tmp_path):
    small, large = (prepared(tmp_path / "a", reference_size=size) for size in (200, 500))
    assert small.reference_name == "train200"
    assert torch.equal(large.reference.features[:200], small.reference.features)
    again = prepared(tmp_path / "b", reference_size=200)
    assert torch.equal(again.reference.features, small.reference.features)
    in_order = small.extractor(FakeSource().train[:200])
    assert not torch.equal(small.reference.features, in_order)
    whole = prepared(tmp_path / "a", reference_size=9999)
    assert whole.reference_name == "train2k"


def test_a_second_evaluation_reads_what_the_first_wrote(tmp_path):
    first = prepared(tmp_path)
    assert first.extractor.images_seen == 2100
    second = prepared(tmp_path)
    assert second.extractor.images_seen == 0
    assert figures(second, generated()) == figures(first, generated())
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_changes_the_reference_computes_it_anew(tmp_path):
    prepared(tmp_path)
    other = FakeSource()
    other.fingerprint = "other data"
    assert prepared(tmp_path, other).extractor.images_seen == 2100
    assert prepared(tmp_path, weights="b").extractor.images_seen == 2100
    assert prepared(tmp_path, reference_size=1999).extractor.images_seen == 2099
    assert prepared(tmp_path, num_samples=101).extractor.images_seen == 101  # the floor's alone


def cut(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda content: b""])
def test_a_damaged_cache_file_is_replaced(tmp_path, damage):
    expected = prepared(tmp_path).reference
    (path,) = tmp_path.glob("train2k-*.pt")
    path.write_bytes(damage(path.read_bytes()))
    metrics = prepared(tmp_path)
    assert metrics.extractor.images_seen == 2000
    assert all(
        torch.equal(vars(metrics.reference)[key], vars(expected)[key]) for key in vars(expected)
    )
    assert prepared(tmp_path).extractor.images_seen == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    metrics = prepared(tmp_path / "file" / "folder")
    assert "could not be written" in capsys.readouterr().err
    assert figures(metrics, generated())[REFERENCE] > 0


def test_an_unavailable_extractor_is_noticed_before_anything_else(tmp_path):
    class Unavailable(FakeExtractor):
        def build(self):
            raise ExtractorUnavailable("no weights")

    metrics = GenerativeMetrics(Unavailable(), None, 100, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no weights"):
        metrics.prepare(object(), "cpu")
    assert not (tmp_path / "cache").exists()


def test_bad_numbers_are_refused(tmp_path):
    metrics = prepared(tmp_path)
    with pytest.raises(ValueError, match="num_samples=100, but 99 images"):
        metrics.compute({"features": torch.zeros(99, 12)}, None)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"num_samples": 1}, r"num_samples=1 must be .* at least 2, .* metrics\.num_samples=5000"),
        ({"num_samples": None}, r"metrics\.num_samples=null must be a whole number"),
        ({"num_samples": "5k"}, r"metrics\.num_samples='5k' must be a whole number"),
        ({"num_samples": 5e3}, r"metrics\.num_samples=5000\.0 must be a whole number"),
        ({"num_samples": True}, r"metrics\.num_samples=true must be a whole number"),
        ({"num_samples": math.nan}, r"metrics\.num_samples=nan must be a whole number"),
        ({"reference_size": 1}, r"metrics\.reference_size=1 must be .* of at least 2, .* null"),
        ({"reference_size": False}, r"metrics\.reference_size=false must be a whole number"),
        ({"reference_size": "all"}, r"metrics\.reference_size='all' must be a whole number"),
        ({"half_splits": -1}, r"metrics\.half_splits=-1 must be a whole number of at least 0"),
        ({"half_splits": 2.5}, r"metrics\.half_splits=2\.5 must be a whole number"),
        ({"half_splits": None}, r"metrics\.half_splits=null must be a whole number"),
        ({"half_splits": True}, r"metrics\.half_splits=true must be a whole number"),
        ({"per_class": 3}, r"metrics\.per_class=3 must be true or false"),
        ({"per_class": "yes"}, r"metrics\.per_class='yes' must be true or false"),
        ({"per_class": None}, r"metrics\.per_class=null must be true or false"),
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind_are_named(setting, sentence):
    known = {"extractor": None, "reference_size": None, "num_samples": 100, "cache_dir": ""}
    with pytest.raises(UserError, match=sentence):
        GenerativeMetrics(**known | setting)


def evaluate_on_rank(rank, world, folder):
    """What one of `world` processes computes, written to a file of its own."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    metrics = prepared(Path(folder) / f"cache{world}", num_samples=101)
    mine = shard(101, *rank_and_world())
    observed = metrics.observe(generated(101)[mine])
    seen = metrics.extractor.images_seen
    values = metrics.compute(metrics.gather([observed], mine), torch.arange(101) % 2)
    again = prepared(Path(folder) / f"cache{world}", num_samples=101).extractor.images_seen
    torch.save((values, seen, again), Path(folder) / f"rank{rank}of{world}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_with_uneven_shards_give_what_one_gives(tmp_path, world):
    metrics = prepared(tmp_path / "single", num_samples=101)
    expected = figures(metrics, generated(101))
    torch.multiprocessing.spawn(evaluate_on_rank, (world, str(tmp_path)), nprocs=world)
    total = 0
    for rank in range(world):
        values, seen, again = torch.load(tmp_path / f"rank{rank}of{world}.pt")
        assert values == pytest.approx(expected, rel=1e-6)
        assert again == 0
        total += seen
    assert total == 2000 + 101 + 101  # nothing twice
    assert len(list((tmp_path / f"cache{world}").iterdir())) == 2


@pytest.mark.parametrize(
    ("choice", "extractor"), [("efficientnet_lite0", EfficientNetLite0), ("inception", Inception)]
)
def test_configurations_build(choice, extractor):
    conf = Path(__file__).parents[1] / "conf"
    with initialize_config_dir(str(conf), version_base=None):
        cfg = compose(overrides=[f"+metrics={choice}", "+data.root=/data"])
        metrics = instantiate(cfg.metrics)
        other = compose(overrides=[f"+metrics={choice}", "metrics/extractor=inception"])
    assert isinstance(metrics.extractor, extractor)
    assert metrics.cache_dir == Path("/data/reference")
    assert metrics.reference_size is None
    assert isinstance(instantiate(other.metrics.extractor), Inception)
