"""Our metrics in any loop, as torchmetrics, and torchmetrics among ours."""

import lightning
import pytest
import torch
import torchmetrics
from helpers.fake_metrics import FakeSource, Network, generated, prepared, values_of
from helpers.ranks import on_ranks
from helpers.refusals import refused
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.built_in import FID

LABELS = torch.arange(101) % 2


def expected_of(metrics, images=None):
    """The values of samples, without those of real images."""
    values = values_of(metrics, images)
    return {name: value for name, value in values.items() if "_real/" not in name}


def of_kind(values, kind):
    """The only value whose name begins with this kind."""
    (value,) = (value for name, value in values.items() if name.split("/")[0] == kind)
    return value


def fid_of_torchmetrics(keep=False, network=None):
    """Their FID on the network of the fake extractor, which may keep features of real images."""
    settings = {"normalize": False, "reset_real_features": not keep, "input_img_size": (3, 4, 4)}
    return FrechetInceptionDistance(network or Network(), **settings)


def test_a_loop_gives_the_values_of_an_evaluation_and_forgets_them(tmp_path):
    metrics = prepared(tmp_path, num_samples=101, per_class=True)
    expected = expected_of(metrics)
    assert "fid_class1/fake/train1k-50" in expected
    collection, extractor = metrics.collection(), metrics.metrics.extractor
    for _ in range(2):
        before = extractor.images_seen
        for images, labels in zip(generated(101).split(40), LABELS.split(40), strict=True):
            collection.update(images, labels)
        found = collection.compute()
        assert extractor.images_seen - before == 101  # once for all metrics
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
        collection.reset()
    collection.update(generated(10))
    assert "fid_class1/fake/train1k-5" not in collection.compute()
    assert "fid/fake/train2k-10" in collection.compute()


def test_one_metric_serves_alone_and_wants_a_reference(tmp_path):
    metrics = prepared(tmp_path, num_samples=101)
    fid = FID(half_splits=0)
    assert isinstance(fid, torchmetrics.Metric)
    with refused("FID", "compare_with", by=ValueError):
        fid.update(generated(2))
    fid.compare_with(metrics.reference, metrics.metrics.observer)
    fid.update(generated(101))
    name = "fid/fake/train2k-101"
    assert fid.compute() == {name: pytest.approx(expected_of(metrics)[name])}


class Loop(lightning.LightningModule):
    """A module of someone else, which validates by our metrics."""

    def __init__(self, metrics):
        super().__init__()
        self.metrics = metrics

    def validation_step(self, batch, batch_idx):
        self.metrics.update(*batch)

    def on_validation_epoch_end(self):
        self.log_dict(self.metrics.compute())
        self.metrics.reset()


def test_a_lightning_module_of_someone_else_logs_our_metrics(tmp_path):
    metrics = prepared(tmp_path, num_samples=101, per_class=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    batches = DataLoader(TensorDataset(generated(101), LABELS), 40)
    for _ in range(2):
        (found,) = trainer.validate(Loop(metrics.collection()), batches, verbose=False)
        assert found == pytest.approx(expected_of(metrics), rel=1e-6)


def compute_on_rank(rank, cache):
    """The values of samples dealt out as by DistributedSampler, and of rank 0's alone."""
    collection = prepared(cache, num_samples=101, per_class=True).collection()
    found = []
    for mine in (slice(rank, 101, 2), slice(0, 50 * (1 - rank))):
        images, labels = generated(101)[mine], LABELS[mine]
        if len(images):
            for batch, classes in zip(images.split(20), labels.split(20), strict=True):
                collection.update(batch, classes)
        found.append({name: value.item() for name, value in collection.compute().items()})
        collection.reset()
    return found


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_even_if_one_has_no_samples(tmp_path):
    ranks = on_ranks(2, tmp_path, compute_on_rank, tmp_path / "cache")
    metrics = [prepared(tmp_path, num_samples=count, per_class=True) for count in (101, 50)]
    expected = [
        expected_of(each, generated(101)[:count])
        for each, count in zip(metrics, (101, 50), strict=True)
    ]
    for found in ranks:
        assert [pytest.approx(each, rel=1e-6) for each in expected] == found


@pytest.mark.parametrize("keep", [False, True])
def test_a_metric_of_torchmetrics_stands_among_ours_beside_its_value_of_real_images(tmp_path, keep):
    theirs = fid_of_torchmetrics(keep)
    metrics = prepared(tmp_path, num_samples=101, extra={"theirs": theirs})
    for _ in range(2):
        values = values_of(metrics)
    assert theirs.real_features_num_samples == (2000 if keep else 0)
    ours = {name: values[f"{name}/fake/train2k-101"] for name in ("fid", "fid_real")}
    for name, value in ours.items():
        assert of_kind(values, name.replace("fid", "theirs")) == pytest.approx(value, rel=1e-4)
    quantity = metrics.metrics.extra_quantities[0]
    assert (quantity.name, quantity.higher_is_better) == ("theirs", False)
    assert quantity.judged


def test_other_settings_of_a_metric_are_measured_anew(tmp_path):
    first = prepared(tmp_path, extra={"theirs": Brightness()})
    prepared(tmp_path, extra={"theirs": Brightness()})
    assert len(list(tmp_path.iterdir())) == 2
    other = prepared(tmp_path, extra={"theirs": Brightness(scale=2)})
    assert len(list(tmp_path.iterdir())) == 3
    known, found = (of_kind(each.real, "theirs_real") for each in (first, other))
    assert found == pytest.approx(2 * known)


class Brightness(torchmetrics.Metric):
    """The mean and the standard deviation of the images' mean values."""

    def __init__(self, scale=1):
        super().__init__()
        self.scale = scale
        self.add_state("means", [], dist_reduce_fx="cat")

    def update(self, imgs):
        self.means.append(imgs.mean((1, 2, 3)))

    def compute(self):
        means = self.scale * torch.cat(self.means)
        return means.mean(), means.std()


class InParts(torchmetrics.Metric):
    """A metric that hands all images to another one."""

    def __init__(self):
        super().__init__()
        self.part = Brightness()

    def update(self, imgs):
        self.part.update(imgs)

    def compute(self):
        return self.part.compute()

    def reset(self):
        super().reset()
        self.part.reset()


def measure_on_rank(rank, cache):
    """The values that a rank gets of metrics that the first computes alone."""
    extra = {"whole": Brightness(), "parts": InParts(), "theirs": fid_of_torchmetrics()}
    metrics = prepared(cache, extra=extra)
    return values_of(metrics)


@pytest.mark.long
def test_the_first_of_two_ranks_computes_metrics_of_torchmetrics_alone(tmp_path):
    first, second = on_ranks(2, tmp_path, measure_on_rank, tmp_path / "cache")
    assert first == second
    expected = (generated() / 255).mean().item()
    assert [of_kind(first, name) for name in ("whole", "parts")] == [pytest.approx(expected)] * 2


TYPED = """
class Scaled(Brightness):
    def compute(self):
        return tuple({scale} * value for value in super().compute())
"""


def test_a_metric_that_was_typed_into_a_notebook_is_known_by_its_code(tmp_path):
    found = []
    for scale in (2, 3, 2):
        typed = {"Brightness": Brightness, "__name__": "__main__"}
        exec(TYPED.format(scale=scale), typed)
        found.append(of_kind(prepared(tmp_path, extra={"it": typed["Scaled"]()}).real, "it_real"))
    assert found[1] == pytest.approx(1.5 * found[0])
    assert found[2] == found[0]
    assert len(list(tmp_path.glob("real-*"))) == 2


def test_a_metric_of_samples_alone_may_have_a_deviation(tmp_path):
    metrics = prepared(tmp_path, extra={"bright": Brightness()})
    values = values_of(metrics)
    means = (generated() / 255).mean((1, 2, 3))
    assert of_kind(values, "bright") == pytest.approx(means.mean().item())
    assert of_kind(values, "bright_std") == pytest.approx(means.std().item())
    assert not metrics.metrics.extra_quantities[0].judged


@pytest.mark.parametrize(
    ("value", "named"),
    [(torch.ones(3), "(3,)"), ((1.0, 2.0, 3.0), "tuple"), ({"a": 1.0}, "dict"), (None, "None")],
)
def test_a_metric_of_torchmetrics_without_a_single_value_is_refused(
    tmp_path, monkeypatch, value, named
):
    monkeypatch.setattr(Brightness, "compute", lambda _: value)
    with refused("metrics.extra.bright", "Brightness", named, by=UserError):
        prepared(tmp_path, extra={"bright": Brightness()})


def test_another_network_gives_another_name_and_another_value_of_real_images(tmp_path):
    other = Network()
    with torch.no_grad():
        other.weight.mul_(2)
    found = [
        prepared(tmp_path, extra={"theirs": fid_of_torchmetrics(network=each)}).real
        for each in (Network(), other)
    ]
    names = [{name for name in real if name.startswith("theirs")} for real in found]
    assert len(names[0]) == 1
    assert names[0] != names[1]
    assert of_kind(found[0], "theirs_real") != of_kind(found[1], "theirs_real")


def test_kept_features_are_of_the_reference_that_is_compared_with(tmp_path):
    theirs = fid_of_torchmetrics(keep=True)
    for train in (2000, 1500):
        metrics = prepared(tmp_path, FakeSource(train=train), extra={"theirs": theirs})
        values = values_of(metrics)
        assert theirs.real_features_num_samples == train
        fid = of_kind(values, "fid")
        assert of_kind(values, "theirs") == pytest.approx(fid, rel=1e-4)


def test_metrics_that_draw_subsets_give_the_same_value_again(tmp_path):
    drawing = KernelInceptionDistance(Network(), subsets=3, subset_size=50, normalize=False)
    metrics = prepared(tmp_path, extra={"theirs": drawing})
    first = values_of(metrics)
    state = torch.get_rng_state()
    assert values_of(metrics) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_that_are_passed_forward_are_all_kept_in_order(tmp_path):
    metrics = prepared(tmp_path, num_samples=101)
    expected, fid = expected_of(metrics), FID()
    fid.compare_with(metrics.reference, metrics.metrics.observer)
    for images in generated(101).split(40):
        fid(images)
    for name, value in fid.compute().items():
        assert value == pytest.approx(expected[name])


def test_a_metric_of_pairs_of_images_is_refused(tmp_path):
    with refused("metrics.extra.ssim", "preds", "target", by=UserError):
        prepared(tmp_path, extra={"ssim": StructuralSimilarityIndexMeasure()})


@pytest.mark.parametrize("name", ["fid", "kid_std", "rfid", "fid_class3", "mine_real"])
def test_a_metric_named_as_another_result_is_refused(tmp_path, name):
    with refused("metrics.extra", name, by=UserError):
        prepared(tmp_path, extra={name: Brightness()})
    with refused("metrics.extra", "fid", by=UserError):  # ours bring their names
        prepared(tmp_path, extra={"mine": FID()})
