"""Searches by Optuna minimise a metric, keep their file, and prune hopeless runs."""

import json
import math

import lightning
import pytest
from helpers.faults import Killed, die
from helpers.refusals import refused
from helpers.tiny_runs import EVALUATED, QUICK, summary_of

from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.training.callbacks import MedianPruning
from diffusion_lab.training.study import final_metric

optuna = pytest.importorskip("optuna")
SEARCH = [
    *("train", "-m", "hparams_search=optuna", "study_name=rates"),
    *QUICK,
    "hydra.sweeper.n_trials=2",
    "optimizer.lr=tag(log, interval(1e-4, 1e-2))",
]

PRUNING = "+callbacks.pruning._target_=diffusion_lab.training.callbacks.MedianPruning"


def rates():
    return optuna.load_study(study_name="rates", storage="sqlite:///outputs/rates.db")


@pytest.mark.long
def test_a_search_minimises_the_validation_loss_and_its_file_survives(lab, tmp_path):
    for _ in range(2):
        lab.done(*SEARCH, "hydra.sweeper.n_trials=1")
    study = rates()
    assert len(study.trials) == 2
    folders = [path.parent for path in tmp_path.glob("outputs/rates/*/summary.json")]
    assert len(folders) == 2
    losses = sorted(summary_of(f)["metrics"]["val/loss"] for f in folders)
    assert sorted(trial.value for trial in study.trials) == losses
    assert study.best_value == losses[0]


@pytest.mark.slow
def test_a_search_without_a_name_has_one(lab, tmp_path):
    unnamed = [a for a in SEARCH if a not in ("study_name=rates", "hydra.sweeper.n_trials=2")]
    lab.done(*unnamed, "hydra.sweeper.n_trials=1")
    assert (tmp_path / "outputs/search.db").is_file()
    assert len(list(tmp_path.glob("outputs/search/*/summary.json"))) == 1


@pytest.mark.slow
def test_a_failed_trial_is_noted_and_the_search_goes_on(lab):
    some = [a for a in SEARCH if not a.startswith(("backbone.patch", "optimizer.lr"))]
    some += ["backbone.patch=3,4", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=4"]
    assert lab(*some)[0] == 1
    states = {trial.params["backbone.patch"]: trial.state.name for trial in rates().trials}
    assert states == {3: "FAIL", 4: "COMPLETE"}


@pytest.mark.slow
def test_a_search_of_which_nothing_is_left_says_why(lab):
    err = lab.done(*SEARCH, "backbone.patch=3", code=1)
    assert err.count("backbone.patch=3") >= 2
    assert "Traceback" not in err
    assert [trial.state.name for trial in rates().trials] == ["FAIL", "FAIL"]


@pytest.mark.slow
def test_a_search_of_a_study_in_a_folder_of_studies_has_its_file_there(lab, tmp_path):
    asked = ["study_name=mine/rates", "hydra.sweeper.n_trials=1", "data.fraction=0.5,1.0"]
    lab.done(*SEARCH[:-1], *asked)
    assert (tmp_path / "outputs/mine/rates.db").is_file()
    assert len(list(tmp_path.glob("outputs/mine/rates/*/summary.json"))) == 1


@pytest.mark.slow
def test_a_search_by_fid_compares_with_validation_images(lab, tmp_path):
    measured = [each for each in SEARCH if each != "callbacks.evaluation=null"]
    lab.done(*measured, "optimized_metric=fid", "hydra.sweeper.n_trials=1")
    (path,) = tmp_path.glob("outputs/rates/*/summary.json")
    fid = summary_of(path.parent)["metrics"]["fid/efficientnet_lite0-96/val20-16"]
    assert rates().best_value == fid


def test_a_metric_is_found_by_its_kind(tmp_path):
    metrics = {"fid/a/b": 3.0, "fid_real/a/b": 1.0, "val/loss": 0.5, "test/loss": math.nan}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics}))
    assert final_metric(tmp_path, "fid") == final_metric(tmp_path, "fid/a/b") == 3.0
    assert final_metric(tmp_path, "val/loss") == 0.5
    with refused("test/loss", "nan"):
        final_metric(tmp_path, "test/loss")


@pytest.mark.long
def test_a_metric_may_have_its_full_name(lab, tmp_path):
    metric = "fid/efficientnet_lite0-96/train64-16"
    line = ["train", "-m", *EVALUATED, "trainer.max_steps=1", "study_name=x", "seed=0"]
    lab.done(*line, f"optimized_metric={metric}")
    (path,) = tmp_path.glob("outputs/x/*/summary.json")
    assert metric in summary_of(path.parent)["metrics"]


def write_rows(folder, losses, metric="val/loss"):
    """Writes a run folder with these values of a metric by training images seen."""
    folder.mkdir(parents=True)
    rows = [{"step": 1, "images": images, metric: loss} for images, loss in losses.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "train')  # cut by a kill
    return folder


SOME = [{1: 5, 2: 3}, {1: 4, 2: 2}, {1: 3}]  # the losses of runs, by images
DIVERGED = [{1: 5}, {1: 3}, {1: math.nan}]
OTHER_BATCH = [{48: 3.0, 96: 1.0}]


@pytest.mark.parametrize(
    ("others", "own", "startup_runs", "images", "hopeless"),
    [
        (SOME, {1: 4.5, 2: 4.2}, 3, 1, True),  # 4.5 > 4
        (SOME, {1: 4.5, 2: 4.2}, 4, 1, False),
        (SOME, {1: 4.5, 2: 4.2}, 2, 2, True),  # 4.2 > 2.5
        (SOME, {1: 4.5, 2: 4.2}, 3, 2, False),  # the last has not seen 2 images
        ([*SOME, {1: 4.5, 2: 4.2}], {1: 2, 2: 9}, 3, 2, False),  # its best value, 2, counts
        (DIVERGED, {1: 4}, 3, 1, False),  # what is no number is worse than any
        ([*DIVERGED, {1: 4}], {1: math.nan}, 3, 1, True),
        (OTHER_BATCH, {32: 4.0, 64: 3.5}, 1, 32, False),  # which has no value yet
        (OTHER_BATCH, {32: 4.0, 64: 3.5}, 1, 64, True),  # 3.5 > 3
        ([*OTHER_BATCH, {32: 4.0, 64: 3.5}], {64: 2.0}, 2, 64, False),  # 2 < 3.25
    ],
)
def test_a_run_is_hopeless_above_the_median_of_others_at_as_many_images(
    tmp_path, others, own, startup_runs, images, hopeless
):
    for number, losses in enumerate(others):
        write_rows(tmp_path / str(number), losses)
    folder = write_rows(tmp_path / "own", own)
    assert MedianPruning(startup_runs=startup_runs).hopeless(folder, images) == hopeless


def test_a_run_is_hopeless_below_the_median_where_higher_is_better(tmp_path, capsys):
    for name, value in {"a": 20.0, "b": 24.0, "nan": math.nan}.items():
        write_rows(tmp_path / name, {1: value, 2: value}, "val/psnr")
    pruning = MedianPruning(metric="val/psnr", startup_runs=3)
    good = write_rows(tmp_path / "good", {1: 22.0, 2: 18.0}, "val/psnr")
    assert not pruning.hopeless(good, 2)  # its best value, 22, is above the median of 20
    bad = write_rows(tmp_path / "bad", {1: 17.0, 2: 16.0}, "val/psnr")
    assert pruning.hopeless(bad, 2)
    assert "17 " in capsys.readouterr().err


def test_two_metrics_prune_a_run_and_have_a_state_each():
    lightning.Trainer(
        callbacks=[MedianPruning("val/loss"), MedianPruning("val/psnr")], logger=False
    )


@pytest.mark.long
def test_a_pruned_run_that_is_stopped_in_its_final_metrics_is_not_trained_on(
    lab, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(MedianPruning, "hopeless", lambda *_: True)
        patch.setattr(DiffusionModule, "on_test_epoch_start", lambda *_: die())
        with pytest.raises(Killed):
            lab("train", *QUICK, PRUNING, "validate_every_n_steps=2", "run_dir=run")
    lab.done("train", "resume=run")
    summary = summary_of(tmp_path / "run")
    assert (summary["finished"], summary["pruned"], summary["steps"]) == (True, True, 2)
    assert "test/loss" in summary["metrics"]


@pytest.mark.slow
def test_a_hopeless_run_ends_early_with_its_metrics(lab, tmp_path):
    for seed in range(2):
        write_rows(tmp_path / f"outputs/rates/{seed}", {16: 0.0})
    lab.done(*SEARCH, "callbacks.pruning.startup_runs=2", "hydra.sweeper.n_trials=1")
    (path,) = tmp_path.glob("outputs/rates/*/summary.json")
    summary = summary_of(path.parent)
    assert (summary["finished"], summary["pruned"], summary["steps"]) == (True, True, 2)
    assert summary["ended_by"] is None
    assert summary["metrics"]["val/loss"] > 0
