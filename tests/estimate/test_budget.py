"""Budgets make runs equal and are saved with the run; contradictions are refused."""

import json

import pytest
import yaml
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY

from diffusion_lab.estimate.budget import ENDLESS, Budget

QUICK = [a for a in TINY if not a.startswith("backbone")]
QUICK += ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
NOTHING = {"reference": None, "by": "macs", "tolerance": 0.02, "images": None, "seconds": None}


def budget(**chosen) -> Budget:
    return Budget(**(NOTHING | {"solved": None} | chosen))


def test_lengths():
    limits = {"trainer.max_steps": 8, "trainer.max_time": "null"}
    assert budget(images=1000).length(128) == limits
    assert budget(images=1024).length(128) == limits
    assert budget(seconds=93_784).length(128) == {
        "trainer.max_steps": ENDLESS,
        "trainer.max_time": "'01:02:03:04'",
    }
    assert budget(reference="unet").length(128) == {}


@pytest.mark.slow
def test_a_run_as_reference_is_measured_on_the_data_to_train_on(lab, run_folder):
    here = ["data=cifar10", "device=meta", "json=true"]
    sized = ["backbone=mlp", "budget=params", "budget.reference=run", "budget.tolerance=0.2"]
    sizes = []
    for asked in (["run=run"], sized):
        code, out, err = lab("profile", *asked, *here)
        assert code == 0, err
        sizes.append(json.loads(out.splitlines()[-1])["params"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


@pytest.mark.slow
def test_what_is_solved_is_in_the_run_which_reopens_without_solving(lab, tmp_path, monkeypatch):
    chosen = ["backbone=dit", "budget=macs", "budget.reference=mlp", "budget.tolerance=0.1"]
    err = lab.done("train", *QUICK, *chosen, "run_dir=run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    solved = dict(each.split("=") for each in config["budget"]["solved"])
    assert_names(err, *config["budget"]["solved"])
    for key, value in solved.items():
        assert config["backbone"][key.removeprefix("backbone.")] == int(value)
    counted = {}
    for name, asked in {"dit": ["run=run"], "mlp": ["backbone=mlp", QUICK[0]]}.items():
        counted[name] = lab.result("profile", *asked, "device=meta")["macs"]
    assert counted["dit"] == pytest.approx(counted["mlp"], rel=0.1)
    monkeypatch.setattr("diffusion_lab.estimate.budget.find_match", None)
    lab.done("train", "resume=run", "trainer.max_steps=5")


@pytest.mark.slow
def test_seconds_end_a_run(lab, tmp_path):
    asked = [*(a for a in QUICK if a != "+debug=fast"), "data.validation_size=20"]
    asked.append("trainer.log_every_n_steps=1")
    lab.done(
        "train",
        *asked,
        "backbone=mlp",
        "budget=seconds",
        "budget.seconds=2",
        "batch_size=8",
        "run_dir=run",
        "lr_schedule=cosine",
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["finished"]
    assert 1.5 < summary["wall_seconds"] < 10
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert rates[-1] < 0.2 * max(rates)  # the schedule follows the clock


def test_images_make_steps_of_any_batch(lab, tmp_path):
    for batch, steps in ((8, 4), (16, 2)):
        lab.done(
            "train",
            *QUICK,
            "backbone=mlp",
            "budget=images",
            "budget.images=32",
            f"batch_size={batch}",
            f"run_dir=run{batch}",
        )
        summary = json.loads((tmp_path / f"run{batch}/summary.json").read_text())
        assert (summary["steps"], summary["images_seen"]) == (steps, 32)
