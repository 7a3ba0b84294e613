"""Samples that are not finite are refused wherever they would be measured or shown as black."""

import json
from pathlib import Path

from helpers.refusals import assert_names
from helpers.tiny_runs import TINY, summary_of

DIVERGING = "guidance.scale=1e300"  # infinite as float32
BAD = "samples are not finite"


def records(folder: Path) -> list[Path]:
    return [*folder.glob("evaluations/*"), *folder.glob("samples/ddim*"), *folder.glob("sweeps/*")]


def test_a_sweep_leaves_out_the_settings_that_draw_them(lab, run_folder):
    code, out, err = lab("sample-sweep", f"run={run_folder}", "guidance.scale=1,1e300", "json=true")
    assert code == 0, err
    assert_names(err, BAD, "guidance.scale=1e+300")
    assert [row["guidance.scale"] for row in json.loads(out)["rows"]] == ["1"]


def test_a_training_that_draws_them_ends_without_metrics_or_pictures(lab, refusal, tmp_path):
    more = ["run_dir=run", "logger=none", "callbacks.evaluation.also_steps=[2]"]
    err = lab.done("train", *TINY, *more, DIVERGING)
    assert_names(err, f"No metrics of step 4: 16 of 16 {BAD}", "No metrics in 2", "No picture of")
    run = tmp_path / "run"
    assert (run / "checkpoints/last.ckpt").is_file()
    summary = summary_of(run)
    assert (summary["finished"], summary["at_other_steps"]) == (True, [])
    assert not [name for name in summary["metrics"] if not name.startswith(("val", "test"))]
    assert not [*run.glob("samples/step*")]
    assert_names(refusal("compare", "run"), "run=run")
