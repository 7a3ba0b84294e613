"""Callbacks are found by class, whatever their key in the configuration."""

import json

from helpers.tiny_runs import TINY


def test_an_evaluation_by_another_name_is_found(lab, tmp_path):
    renamed = ["~callbacks.evaluation", "~callbacks.sample_grid"]
    renamed += ["+callbacks@callbacks.fid=evaluation", "+callbacks@callbacks.pictures=sample_grid"]
    code, _, err = lab("train", *TINY, *renamed, "logger=none", "run_dir=run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert any(name.startswith("fid/") for name in summary["metrics"])
    assert summary["protocol"]
    assert list((tmp_path / "run/samples").glob("step_*.png"))


def test_what_is_no_callback_is_refused_by_its_key(refusal):
    assert "callbacks.odd" in refusal("train", *TINY, "+callbacks.odd._target_=torch.nn.Identity")
