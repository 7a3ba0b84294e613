"""A tuned study is trained and published, compared without its runs, and resumed elsewhere."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.tiny_study import STUDY

pytestmark = pytest.mark.slow

TINY = ["study", "tiny", "--config-dir=conf"]


@pytest.fixture
def published(lab, tmp_path) -> Path:
    """The published runs of a study, which are gone themselves; its page is in `before`."""
    record = {"record": {"publish": {}, "needs": "page"}}
    study = STUDY | {"stages": STUDY["stages"] | record}
    (tmp_path / "conf/study").mkdir(parents=True)
    (tmp_path / "conf/study/tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    lab.done(*TINY)
    shutil.move("outputs/tiny/record", "published")
    shutil.move("outputs/tiny/page", "before")
    shutil.move("outputs", tmp_path / "away")
    return Path("published")


def numbers(folder: Path) -> list[dict]:
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    return [{key: value for key, value in row.items() if key != "folder"} for row in rows]


def test_the_records_have_the_tuning_and_give_the_same_comparison(lab, published):
    result = lab.result("compare", "published", "output=after")
    assert result["compositions"].keys() == {"Narrow", "Wide"}
    before, after = Path("before"), Path("after")
    assert numbers(before) == numbers(after) == numbers(published)
    assert (before / "table.csv").read_text() == (after / "table.csv").read_text()
    assert list(published.rglob("*.ckpt")) == []
    chosen = json.loads((published / "tuning/tuning.json").read_text())["Wide"]["chosen"]
    assert len(list(published.glob("tuning/*/summary.json"))) == 2
    card = json.loads((published / "card.json").read_text())
    assert card["chosen"] == {"tuning/tuning.json": {"Wide": chosen}}
    hours = card["hours"]
    assert [hours[kind]["runs"] for kind in ("runs", "tuning", "total")] == [4, 2, 6]
    assert all(each["core_hours"] is not None for each in hours.values())
    (machine,) = card["machines"]
    assert machine["processor"]
    assert machine["versions"].keys() >= {"torch", "lightning", "diffusion-lab"}


def test_a_study_is_resumed_from_what_was_published(lab, published):
    shutil.copytree(published / "runs", "outputs/tiny/train")
    shutil.copytree(published / "tuning", "outputs/tiny/tune")
    lab.done(*TINY, "stages=tune,train", "arms=Wide", "protocol.seeds=[0,1,2]")
    # the tuning and the runs of seeds 0 and 1 have no checkpoints, as they were not trained here
    (trained,) = Path("outputs").rglob("last.ckpt")
    assert trained.parent.parent.name == "Wide_seed-2"
