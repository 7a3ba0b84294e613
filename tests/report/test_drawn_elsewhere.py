"""Images that another program drew, in a comparison with runs."""

import csv
import json

import pytest
from helpers.fake_runs import UNET, fake_group, fake_images, fake_run
from helpers.refusals import refused

from diffusion_lab.analysis.publishing import publish
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare


def others(root, name, fids, **more):
    return [fake_images(root / f"{name}{i}", fid, i, name=name) for i, fid in enumerate(fids)]


def test_images_are_judged_beside_runs_over_common_seeds(tmp_path):
    fake_group(tmp_path, "unet", [50.0, 51.5, 49.0], config=UNET)
    fake_group(tmp_path, "dit", [80.0, 81.0, 79.5])
    others(tmp_path, "theirs", [30.0, 31.0, 30.5])
    found = collect([tmp_path])
    assert [arm.name for arm in found.arms] == ["theirs", "UNet", "DiT"]
    assert [arm.drawn_elsewhere for arm in found.arms] == [True, False, False]
    result = compare([str(tmp_path)], str(tmp_path / "comparison"))
    assert result["verdict"]["fid"].startswith("theirs is best")
    with (tmp_path / "comparison/table.csv").open() as file:
        rows = {row["composition"]: row for row in csv.DictReader(file)}
    assert float(rows["theirs"]["fid"]) == 30.5
    assert rows["theirs"]["seeds"] == "3"
    # costs and losses are those of runs alone
    assert rows["theirs"]["macs"] == rows["theirs"]["test_loss"] == ""
    assert rows["UNet"]["macs"]
    assert rows["UNet"]["test_loss"]
    page = (tmp_path / "comparison/index.html").read_text()
    assert "theirs" in page
    assert "Every run saw 6,400 images" in page


@pytest.mark.parametrize("name", ["UNet", "theirs", "a.b"])
def test_a_single_composition_beside_images_has_the_name_of_its_network(tmp_path, name):
    fake_group(tmp_path, "unet", [50.0, 51.0], config=UNET)
    others(tmp_path, name, [30.0, 31.0])
    names = {arm.name: len(arm.runs) for arm in collect([tmp_path]).arms}
    assert names.pop("UNet") == 2
    assert list(names.values()) == [2]  # another name than the network's
    assert next(iter(names)).startswith(name)


def test_images_alone_and_two_sets_of_them_compare(tmp_path):
    others(tmp_path, "one", [30.0, 31.0])
    others(tmp_path, "two", [50.0, 52.0])
    found = compare([str(tmp_path)], str(tmp_path / "comparison"))
    assert set(found["compositions"]) == {"one", "two"}
    assert "one is better than two" in found["verdict"]["fid"]


def test_images_fit_any_sampling_of_runs_but_runs_must_share_one(tmp_path):
    other = {"sampler": {"steps": 20}, "callbacks": {"evaluation": {"seed": 5}}}
    one, two = fake_run(tmp_path / "a", 50.0), fake_run(tmp_path / "b", 60.0, config=UNET | other)
    theirs = fake_images(tmp_path / "theirs", 30.0)
    for run in (one, two):
        assert len(collect([run, theirs]).arms) == 2
    with refused("steps"):
        collect([one, two, theirs])


def test_images_measured_by_another_protocol_are_refused(tmp_path):
    run = fake_run(tmp_path / "a", 50.0, protocol={"num_samples": 500})
    with refused("metrics.num_samples", 500, 1000):
        collect([run, fake_images(tmp_path / "theirs", 30.0)])


def test_images_are_published_beside_runs(tmp_path):
    fake_group(tmp_path / "study", "unet", [50.0, 51.0], config=UNET)
    others(tmp_path / "study", "theirs", [30.0, 31.0])
    publish([str(tmp_path / "study")], str(tmp_path / "published"))
    card = json.loads((tmp_path / "published/card.json").read_text())
    assert card["compositions"].keys() == {"UNet", "theirs"}
    assert card["hours"]["runs"]["runs"] == 2  # of training
    again = collect([tmp_path / "published"])
    means = again.values("fid").groupby("arm").value.mean()
    assert means.to_dict() == {"UNet": 50.5, "theirs": 30.5}
