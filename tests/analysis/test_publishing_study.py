"""A tuned study is trained, published, compared without its outputs, and resumed elsewhere."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY

pytestmark = pytest.mark.slow

QUICK = [each for each in TINY if each != "backbone.depth=1"]
QUICK += ["callbacks.sample_grid=null", "logger=none"]
TUNING = ["tuning=learning_rate", "tuning.of=[backbone.depth]", "tuning.metric=val/loss"]
TUNING += ["tuning.images=null", "tuning.values={optimizer.lr:[1e-3,2e-3]}", "tuning.grow=0"]
STUDY = ["train", "-m", "study_name=mine", *QUICK, *TUNING, "backbone.depth=1,2"]


@pytest.fixture
def published(lab, tmp_path, trained_once) -> Path:
    """The published study, in a folder from which the study itself is gone."""
    shutil.copytree(trained_once(*STUDY, "seed=0") / "outputs", "outputs", symlinks=True)
    code, out, err = lab("publish", "outputs/mine", "output=published", "json=true")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["runs"] == 2
    code, _, err = lab("compare", "outputs/mine", "output=before")
    assert code == 0, err
    shutil.move("outputs", tmp_path / "away")
    return Path("published")


def numbers(folder: str) -> list[dict]:
    rows = list(csv.DictReader((Path(folder) / "runs.csv").open()))
    return [{key: value for key, value in row.items() if key != "folder"} for row in rows]


def test_trained_runs_give_the_same_comparison_from_their_records(lab, published):
    code, _, err = lab("compare", "published", "output=after")
    assert code == 0, err
    assert numbers("before") == numbers("after") == numbers("published")
    assert Path("before/table.csv").read_text() == Path("after/table.csv").read_text()
    assert list(published.rglob("*.ckpt")) == []


def test_the_card_has_what_trained_runs_record(lab, published):
    card = json.loads((published / "card.json").read_text())
    own = card["commands"]["runs"]
    assert_names(" ".join(card["commands"]["common"]), "study_name=mine", "tuning=learning_rate")
    assert sorted(word for each in own.values() for word in each) == [
        "backbone.depth=1",
        "backbone.depth=2",
    ]
    (machine,) = card["machines"]
    assert machine["processor"]
    assert machine["versions"].keys() >= {"torch", "lightning", "diffusion-lab"}
    hours = card["hours"]
    assert [hours[kind]["runs"] for kind in ("runs", "tuning", "total")] == [2, 4, 6]
    assert all(each["core_hours"] is not None for each in hours.values())
    assert card["tuning"]["of"] == ["backbone.depth"]
    (chosen,) = card["tuning"]["chosen"].values()
    assert chosen.keys() == {"backbone.depth=1", "backbone.depth=2"}


def test_a_study_is_resumed_from_what_was_published(lab, published):
    shutil.copytree(published / "runs", "outputs/mine")
    shutil.copytree(published / "tuning", "outputs/mine/tuning")
    code, _, err = lab(*STUDY, "seed=0,1")
    assert code == 0, err
    # the tuning and the runs of seed 0 have no checkpoints, as they were not trained here
    trained = sorted(path.parent.parent.name for path in Path("outputs").rglob("last.ckpt"))
    assert len(trained) == 2
    assert all("seed-1" in name for name in trained)
    code, out, err = lab("compare", "outputs/mine", "json=true")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])["compositions"]
    assert [len(runs) for runs in found.values()] == [2, 2]
