"""Controls of the count of copies find what was planted, and refuse runs that are no control."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.refusals import assert_names, refused
from helpers.tiny_data import TinyData, tiny_data
from helpers.tiny_runs import TINY, summary_of
from omegaconf import OmegaConf
from torch import nn

from diffusion_lab.analysis import copy_controls
from diffusion_lab.analysis.copy_controls import (
    ControlRun,
    CopySpaces,
    against_control,
    copies_found,
    denoised,
    images_unseen,
    levels_at,
    other_settings,
)
from diffusion_lab.assembly.pipeline import Generator, Pipeline
from diffusion_lab.common.hashing import of_file
from diffusion_lab.common.images import to_float
from diffusion_lab.data import ImageDataModule
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.noise import broadcast
from diffusion_lab.diffusion.sampler import Euler
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Rectified, VarianceExploding
from diffusion_lab.first_stage.base import Pixels
from diffusion_lab.metrics.extractor.base import FeatureExtractor
from diffusion_lab.metrics.neighbours import Neighbours, equal_sides
from diffusion_lab.report.records import copies_in
from diffusion_lab.runs.checkpoints import LAST, file_of
from diffusion_lab.runs.opened import OpenRun

SHAPE = TinyData.native_shape
SPACES = {"halves", "pixels"}


class Halves(FeatureExtractor):
    """Features that are the pixels of the upper half."""

    name, dim, channels, preprocessing = "halves", 32, 1, "none"

    def build(self):
        return nn.Sequential(nn.Flatten()), "none"

    def outputs(self, images):
        return {"features": to_float(images[:, :, :4]).flatten(1)}


class FakeDenoiser(nn.Module):
    """A denoiser whose estimate of x0 is any function of x / alpha."""

    image_shape = SHAPE

    def __init__(self, estimate, labels):
        super().__init__()
        self.estimate, self.parameter = estimate, nn.Parameter(torch.zeros(1))
        self.conditioning = SimpleNamespace(conditional=True, labels=labels)

    def forward(self, x, level, given):
        assert given.labels.shape == (len(x),)
        return Estimate(self.estimate(x / broadcast(level.alpha, x)))


class Planted(Generator):
    """A run that draws these images."""

    def __init__(self, images):
        self.images = images

    def drawn(self, ids, seed, labels, on_step):
        return self.images[list(ids)]


def spaces_of(data: ImageDataModule, folder) -> CopySpaces:
    extractor = Halves()
    extractor.load("cpu")
    return CopySpaces(
        SimpleNamespace(extractor=extractor, cache_dir=str(folder)), data.train_images(), False
    )


def neighbours_of(spaces: CopySpaces, data: ImageDataModule, drawn: dict) -> dict[str, Neighbours]:
    sides, test = equal_sides(data.train_labels(), data.test_labels()), views_of_tests(spaces, data)
    return {
        name: Neighbours.of(drawn[name], test[name], known, sides)
        for name, known in spaces.known.items()
    }


def views_of_tests(spaces: CopySpaces, data: ImageDataModule) -> dict:
    return spaces.views(data.test_images())


@pytest.fixture
def data() -> ImageDataModule:
    return tiny_data()


@pytest.fixture
def spaces(data, tmp_path) -> CopySpaces:
    return spaces_of(data, tmp_path)


def run_of(data: ImageDataModule, estimate) -> tuple[SimpleNamespace, Pipeline]:
    """A run on tiny data with this estimate of x0."""
    pipeline = Pipeline(
        FakeDenoiser(estimate, data.labels),
        Rectified(),
        Euler(10, UniformGrid()),
        Guidance(),
        Pixels(SHAPE),
        data.labels,
    )
    return SimpleNamespace(datamodule=data, autocast=nullcontext()), pipeline


def counted(data, spaces, estimate, **settings) -> dict:
    cfg = {"batch_size": 7, "seed": 0, "control_images": 20} | settings
    measured = neighbours_of(spaces, data, spaces.views(data.test_images()))
    levels = levels_at(Rectified(), [0.1, 0.3])
    return copies_found(OmegaConf.create(cfg), *run_of(data, estimate), levels, spaces, measured)


def recall(data: ImageDataModule):
    """The estimate of a model that knows its training images by heart."""
    known = to_float(data.train_images())

    def estimate(x):
        return known[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)]

    return estimate


def test_a_model_that_knows_its_images_by_heart_has_all_of_its_copies_found(data, spaces):
    found = counted(data, spaces, recall(data))
    assert set(found) == {"positive"}
    assert found["positive"]["images"] == 20
    assert set(found["positive"]["sigma_over_alpha"]) == {"0.1", "0.3"}
    # much noise may lead to another training image, which is a copy, too
    for ratio, least in (("0.1", 1), ("0.3", 0.9)):
        rates = found["positive"]["sigma_over_alpha"][ratio]
        assert set(rates) == SPACES
        for shares in rates.values():
            assert shares["copies"] == shares["near_duplicates"] == 1
            assert shares["source_found"] >= least


def test_a_model_far_from_its_images_has_none_found(data, spaces):
    found = counted(data, spaces, torch.ones_like)["positive"]["sigma_over_alpha"]
    for rates in found.values():
        for shares in rates.values():
            assert shares["copies"] == shares["near_duplicates"] == 0
            assert shares["source_found"] < 0.2


def test_no_more_images_are_denoised_than_there_are(data, spaces):
    assert counted(data, spaces, recall(data), control_images=1000)["positive"]["images"] == 64


def test_the_noise_depends_on_seed_and_image_but_not_on_the_batch(data):
    run = run_of(data, lambda x: x)  # leaves the noise on the images
    level, chosen = levels_at(Rectified(), [0.1])["0.1"], torch.arange(10, 20)

    def renewed(batch_size: int, seed: int) -> torch.Tensor:
        return denoised(*run, chosen, level, batch_size, seed)

    images = renewed(10, 0)
    assert torch.equal(images, renewed(3, 0))
    assert not torch.equal(images, renewed(10, 1))
    error = to_float(images) - to_float(data.train_images()[chosen])
    inside = (images > 0) & (images < 255)
    assert error[inside].std() == pytest.approx(0.1, rel=0.15)
    assert len({each.numpy().tobytes() for each in error}) == 10


def test_an_image_that_stands_twice_in_the_data_is_its_own_source(spaces):
    twice = CopySpaces(spaces.metrics, torch.cat([spaces.training[:5]] * 2), False)
    found = twice.rates(twice.training, torch.arange(10), dict.fromkeys(SPACES, 1.0))
    assert all(shares["source_found"] == 1 for shares in found.values())


def test_a_level_that_the_schedule_does_not_have_is_refused():
    assert levels_at(Rectified(), [0.25])["0.25"].t == pytest.approx(0.2)
    with refused("positive_at", 0.001, 0.02):
        levels_at(VarianceExploding(sigma_min=0.02), [0.3, 0.001])


def test_the_limit_from_a_control_is_the_quantile_of_its_distances():
    theirs = torch.stack([torch.arange(1.0, 102.0), torch.arange(2.0, 103.0)], 1).double()
    ours = torch.tensor([[0.5, 9], [1.5, 9], [2.5, 9], [50, 60]], dtype=torch.float64)
    test = torch.arange(4.0, 105.0).double()
    found = against_control(ours, test, theirs)
    # of 101 values in order, the quantile of 1 % is the second
    assert (found["limit"], found["control_limit"]) == (5, 2)
    assert (found["copies"], found["near_duplicates"]) == (0.75, 0.75)
    assert found["control_copies"] == pytest.approx(4 / 101)
    assert found["copies_by_control"] == 0.5
    # below the second of 101, one expects 2 / 102
    assert found["copy_ratio_by_control"] == pytest.approx(0.5 * 102 / 2)


def halves(**settings: object) -> tuple[ImageDataModule, ImageDataModule]:
    """Two modules that train on parts of the tiny data, by other seeds."""
    return tuple(tiny_data(subset_seed=seed, **{"fraction": 0.5} | settings) for seed in (0, 1))


def test_images_that_both_runs_saw_are_left_out(tmp_path, monkeypatch):
    ours, theirs = halves()
    spaces = spaces_of(ours, tmp_path)
    unseen = images_unseen(ours, theirs, "other")
    shared = spaces.training[~unseen]
    assert 2 <= len(shared) < 30
    equal = (spaces.training[:, None] == theirs.train_images()).flatten(2).all(2)
    assert torch.equal(unseen, ~equal.any(1))

    opened = SimpleNamespace(datamodule=theirs, autocast=nullcontext(), weights={"checkpoint": "a"})
    opened.draw_all = partial(OpenRun.draw_all, opened)
    control = ControlRun(opened, Planted(shared), unseen, [])
    drawn, test = spaces.views(shared), views_of_tests(spaces, ours)
    measured = neighbours_of(spaces, ours, drawn)
    assert all(space.results()["copies"] == 1 for space in measured.values())
    cfg = OmegaConf.create(
        {
            "num_samples": len(shared),
            "batch_size": 4,
            "seed": 0,
            "run": str(tmp_path),
            "control": str(tmp_path),
        }
    )
    found = control.counted(cfg, spaces, drawn, test)
    assert found["shared_images"] == len(shared)
    assert found["images_seen"] == [None, None]  # these runs have no summary
    summary = SimpleNamespace(images_seen=640, steps=10)
    monkeypatch.setattr(copy_controls, "load_summary", lambda run: summary)
    for average, seen in ((None, 640), ("0.1", 640), ("0.1_step5", 320)):
        cfg.average = average
        again = control.counted(cfg, spaces, drawn, test)
        assert again["images_seen"] == [seen, seen]
    assert found["training_images"] == len(unseen) - len(shared)
    left = to_float(spaces.training[unseen]).flatten(1)
    nearest = torch.cdist(to_float(shared).flatten(1), left).min(1).values
    limit = torch.cdist(to_float(ours.test_images()).flatten(1), left).min(1).values.quantile(0.01)
    pixels = found["neighbours"]["pixels"]
    assert pixels["limit"] == pytest.approx(limit.item(), rel=1e-5)
    assert pixels["control_limit"] == pytest.approx(nearest.quantile(0.01).item(), rel=1e-5)
    assert pixels["copies"] == pixels["control_copies"] < 1


class OtherImages(TinyData):
    def load(self):
        training, test = super().load()
        return training._replace(images=255 - training.images), test


class OtherClasses(TinyData):
    class_names = ("first", "second", "third", "fifth")


def test_a_run_that_is_no_control_is_refused():
    ours, theirs = halves()
    for other, named in (
        (ours, "32"),
        (tiny_data(), "32"),  # trained on all images, those of the run among them
        (ImageDataModule(OtherImages(), validation_size=20), "other data"),
        (ImageDataModule(OtherClasses(), validation_size=20), "fifth"),
        (ImageDataModule(TinyData(), validation_size=20, pad=16), "16"),
    ):
        with refused("control=other", named):
            images_unseen(ours, other, "other")
    assert images_unseen(ours, theirs, "other").any()


def test_settings_of_another_composition_are_named():
    ours = OmegaConf.create({"seed": 0, "batch_size": 64, "data": {"subset_seed": 0}})
    theirs = OmegaConf.create({"seed": 1, "batch_size": 64, "data": {"subset_seed": 1}})
    assert other_settings(ours, theirs) == []
    theirs.batch_size = 32
    theirs.data.fraction = 0.5
    assert other_settings(ours, theirs) == ["batch_size", "data.fraction"]


@pytest.fixture
def pair(lab, tmp_path, trained_once):
    """The arguments of the command for a run, with a control on another quarter of the data."""
    folders = [
        trained_once("train", *TINY, "run_dir=run", "data.fraction=0.5", f"data.subset_seed={seed}")
        for seed in (0, 1)
    ]
    run, control = (folder / "run" for folder in folders)
    return ["memorization", f"run={run}", f"control={control}", "output=report", "num_samples=12"]


@pytest.mark.slow
def test_the_command_reports_all_controls(lab, pair, tmp_path):
    code, out, err = lab(*pair, "control_images=10", "json=true")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "report/report.json").read_text())
    controls, spaces = result["controls"], {"efficientnet_lite0-96", "pixels"}
    assert set(controls) == {"positive", "negative"}
    assert controls["positive"]["images"] == 10
    levels = controls["positive"]["sigma_over_alpha"]
    assert set(levels) == {"0.1", "0.3"}
    assert all(set(rates) == spaces for rates in levels.values())
    negative = controls["negative"]
    assert negative["run"] == pair[2].removeprefix("control=")
    assert negative["training_images"] + negative["shared_images"] == result["training_images"]
    assert negative["shared_images"] > 0
    assert negative["other_settings"] == []
    assert negative["images_seen"][0] == negative["images_seen"][1] > 0
    assert set(negative["neighbours"]) == spaces
    assert_names(err, negative["run"], negative["shared_images"], "0.1 / 0.3")
    counts = copies_in(result)  # as `compare` reads them
    ratio = negative["neighbours"]["pixels"]["copy_ratio_by_control"]
    assert counts["pixel_copy_ratio_by_control"] == ratio
    found = controls["positive"]["sigma_over_alpha"]["0.3"]["efficientnet_lite0-96"]
    assert counts["copies_found_at_0.3"] == found["copies"]


@pytest.mark.slow
def test_a_step_is_that_of_both_runs(lab, trained_once):
    parts = [["data.fraction=0.5", f"data.subset_seed={seed}"] for seed in (0, 1)]
    kept = ["trainer.max_steps=8", "callbacks.checkpoint.keep_every_n_steps=4"]
    run = trained_once("train", *TINY, "run_dir=run", *parts[0]) / "run"
    control = trained_once("train", *TINY, "run_dir=run", *parts[1], *kept) / "run"
    few = ["num_samples=4", "positive_at=null", "output=report"]
    images, step = (summary_of(run)[name] for name in ("images_seen", "steps"))
    assert step == 4
    for chosen, seen in (("null", 2 * images), (step, images)):
        asked = ["memorization", f"run={run}", f"control={control}", f"step={chosen}", *few]
        negative = lab.result(*asked)["controls"]["negative"]
        assert negative["images_seen"] == [images, seen]
        last, earlier = control / LAST, file_of(control, step)
        used = of_file(last if chosen == "null" else earlier)
        assert negative["weights"]["checkpoint"] == used != of_file(run / LAST)


@pytest.mark.slow
def test_controls_change_neither_the_count_nor_its_protocol(lab, pair):
    reports = []
    for arguments in (pair, [*pair[:2], *pair[3:], "positive_at=null"]):
        result = lab.result(*arguments)
        reports.append(result)
    for key in ("neighbours", "protocol", "fid", "sampling"):
        assert reports[0][key] == reports[1][key]
