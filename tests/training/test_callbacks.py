"""Callbacks are found by class, whatever their key in the configuration."""

import json

import pytest
from helpers.tiny_runs import TINY


@pytest.mark.slow
def test_runs_with_callbacks_by_other_names_are_measured_and_compared(lab, tmp_path):
    renamed = ["callbacks.evaluation=null", "~callbacks.sample_grid"]
    renamed += ["+callbacks@callbacks.mine=evaluation", "callbacks.mine.seed=5"]
    renamed += ["+callbacks@callbacks.pictures=sample_grid", "logger=none"]
    for seed in range(2):
        code, _, err = lab("train", *TINY, *renamed, f"seed={seed}", f"run_dir=run{seed}")
        assert code == 0, err
    summary = json.loads((tmp_path / "run0/summary.json").read_text())
    (fid,) = (name for name in summary["metrics"] if name.startswith("fid/"))
    assert summary["protocol"]
    assert summary["sampling"]["seed"] == 5
    assert summary["sampling"]["sampler"]["steps"] == 3
    assert list((tmp_path / "run0/samples").glob("step_*.png"))
    code, _, err = lab("compare", "run0", "run1")
    assert code == 0, err
    code, out, err = lab("evaluate", "run=run0", "against=run1", "json=true")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])[fid] == pytest.approx(summary["metrics"][fid])


def test_what_is_no_callback_is_refused_by_its_key(refusal):
    assert "callbacks.odd" in refusal("train", *TINY, "+callbacks.odd._target_=torch.nn.Identity")


def test_samples_in_other_numbers_of_steps_are_measured_at_the_end(lab, tmp_path):
    also = ["callbacks.evaluation.also_steps=[5]", "logger=none"]
    also += ["optimizer.lr=1e-2", "lr_schedule.warmup_images=0", "callbacks.weight_averaging=null"]
    code, _, err = lab("train", *TINY, *also, "run_dir=run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (record,) = summary["at_other_steps"]
    assert summary["sampling"]["sampler"]["steps"] == 3
    assert record["sampling"]["sampler"]["steps"] == 5
    assert record["sampling"] | {"sampler": summary["sampling"]["sampler"]} == summary["sampling"]
    (fid,) = (name for name in record["metrics"] if name.startswith("fid/"))
    assert record["metrics"][fid] != summary["metrics"][fid]
    code, out, err = lab("evaluate", "run=run", "sampler.steps=5", "json=true")
    assert code == 0, err
    measured = json.loads(out.splitlines()[-1])
    assert measured[fid] == pytest.approx(record["metrics"][fid])


@pytest.mark.parametrize(
    "more",
    [
        ["callbacks.evaluation.also_steps=[0]"],
        ["callbacks.evaluation.also_steps=[2000]", "schedule=ddpm_linear", "sampler=ddim",
         "sampler/time_grid=leading"],
        ["callbacks.evaluation.also_steps=[5]", "sampler=runge_kutta", "sampler.steps=50"],
        ["callbacks.evaluation.also_steps=[1]", "sampler=restart", "sampler.steps=8"],
        ["callbacks.evaluation.also_steps=[3]", "sampler=euler_ancestral", "sampler.steps=1",
         "coupling=optimal_transport"],
    ],
)  # fmt: skip
def test_other_numbers_of_steps_that_cannot_be_are_refused(refusal, more):
    assert "also_steps" in refusal("train", *TINY, *more, "run_dir=run")
