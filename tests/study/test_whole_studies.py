"""The studies of conf/study, tiny, from nothing to their pages, stopped and killed on the way.

What a study publishes gives the same comparison, and the study goes on from it.
"""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from helpers.commands import prepare_for_commands
from helpers.small_studies import STUDIES, TINY
from helpers.started_study import ends, started, summaries, waits_for
from helpers.tiny_runs import rows
from helpers.tiny_study import STUDY

from diffusion_lab.runs.progress import is_locked

pytestmark = pytest.mark.slow
BEGUN = {  # the stages in which a study is stopped by Ctrl-C, and killed
    "unet_vs_dit": ("tune", "train"),
    "few_steps": ("start-EDM", "reflow"),
    "families": ("kl", "codes"),
    "low_data": ("tune", "train"),
    "latent": ("kl", "latents"),
    "scaling": ("tune", "train"),
}
ONE = ["study", "tiny", "--config-dir=conf"]


def finished(name: str) -> dict[Path, dict]:
    return {path: run for path, run in summaries(name).items() if run["finished"]}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_ends_with_each_run_once_and_its_page(name, tmp_path, monkeypatch):
    prepare_for_commands(monkeypatch, tmp_path)
    command = [name, *TINY, *STUDIES[name]]
    stopped, killed = BEGUN[name]
    first = started(*command)
    waits_for(f"{name}/{stopped}*/**/config.yaml")
    os.kill(first.pid, signal.SIGINT)
    code, said = ends(first)
    assert code == 130, said
    before = finished(name)
    second = started(*command)
    waits_for(f"{name}/{killed}/*/config.yaml")
    os.kill(second.pid, signal.SIGKILL)
    ends(second)
    while any(map(is_locked, (path.parent for path in Path("outputs").rglob("config.yaml")))):
        time.sleep(0.1)
    before |= finished(name)
    code, said = ends(started(*command))
    assert code == 0, said
    runs = summaries(name)
    assert runs == finished(name)
    assert runs | before == runs, "what had finished is not trained again"
    for path in runs:
        steps = [row["step"] for row in rows(path.parent) if "train/loss" in row]
        assert steps == sorted(set(steps)), path
    made = Path("outputs", name)
    assert (made / "record/card.json").is_file()
    pages = {path: path.stat().st_mtime for path in made.glob("page*/**/index.html")}
    assert pages
    code, said = ends(started(*command))
    assert code == 0, said
    assert summaries(name) == runs
    assert pages == {path: path.stat().st_mtime for path in pages}


@pytest.fixture
def published(lab, tmp_path) -> Path:
    """The published runs of a study, which are gone themselves; its page is in `before`."""
    record = {"record": {"publish": {}, "needs": "page"}}
    study = STUDY | {"stages": STUDY["stages"] | record}
    (tmp_path / "conf/study").mkdir(parents=True)
    (tmp_path / "conf/study/tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    lab.done(*ONE)
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
    lab.done(*ONE, "stages=tune,train", "arms=Wide", "protocol.seeds=[0,1,2]")
    # the tuning and the runs of seeds 0 and 1 have no checkpoints, as they were not trained here
    (trained,) = Path("outputs").rglob("last.ckpt")
    assert trained.parent.parent.name == "Wide_seed-2"
