"""Runs in MLflow and Trackio are read back from there, which takes seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.logged import (
    DRAWING,
    ROWS,
    assert_same_picture,
    assert_same_rows,
    by_step,
    once_each,
    without_times,
)
from helpers.paths import ROOT
from helpers.tiny_runs import TINY, summary_of
from omegaconf import OmegaConf

from diffusion_lab.training.logger.dashboards import local_store

COMMAND = ["train", *DRAWING, *ROWS, "run_dir=outputs/net/run"]
PICTURES = [("denoising", 10), *(("samples", step) for step in (2, 4, 6, 8, 10))]


# a program that logs a run of the name that it is given
OPENING = """
import sys
from pathlib import Path
from diffusion_lab.training.logger import Clock, MLflow
logger = MLflow(Path(sys.argv[1]), Clock(8), {"name": "x"}, 0, run_id=sys.argv[1])
print(logger.start())
logger.log_metrics({"train/loss": 1.0}, 1)
logger.finish({"steps": 1, "finished": True})
"""


@pytest.fixture(scope="module")
def mlflow():
    return pytest.importorskip("mlflow")


@pytest.mark.slow
def test_an_mlflow_run_continues_when_it_is_resumed_and_has_its_pictures(
    lab, mlflow, tmp_path, monkeypatch, killed_at_step
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed_at_step(6, *COMMAND, "logger=mlflow", "logger.mlflow.tags=[first,cpu]")
    lab.done("train", "resume=outputs/net/run", "trainer.max_steps=10")
    folder = Path("outputs/net/run")
    client = mlflow.MlflowClient(local_store())
    (experiment,) = client.search_experiments(filter_string="name = 'diffusion-lab'")
    (run,) = client.search_runs([experiment.experiment_id])
    saved = OmegaConf.load(folder / "config.yaml")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fashion_mnist_dit/run"
    assert run.data.tags["diffusion_lab.run_id"] == saved.logger.mlflow.run_id
    assert run.data.tags["tags"] == "first, cpu"
    # the last step of the first half was logged, but is not in a checkpoint
    steps = once_each(
        (name, metric.step, metric.value)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    )
    assert_same_rows(steps, folder)
    assert steps[10]["summary/parameters"] == summary_of(folder)["parameters"]
    parameters = run.data.params
    assert parameters["backbone.width"] == "32"
    assert parameters["choices.backbone"] == "dit"
    assert parameters["trainer.max_steps"] == "8"  # MLflow's parameters cannot change
    paths = [each.path for each in client.list_artifacts(run.info.run_id, "images")]
    pictures = [path for path in paths if path.endswith(".png")]
    drawn = [re.search(r"grids~(\w+)\+step\+(\d+)\+", path).groups() for path in pictures]
    assert sorted((name, int(step)) for name, step in drawn) == PICTURES
    (path,) = [path for path in pictures if "+step+6+" in path]
    local = client.download_artifacts(run.info.run_id, path, str(tmp_path))
    assert_same_picture(Path(local), folder / "samples/step_0000006.png")


@pytest.mark.slow
def test_a_server_that_is_away_does_not_hold_training_up(lab, tmp_path, mlflow):
    nowhere = ["logger.mlflow.tracking_uri=http://127.0.0.1:1", "run_dir=run"]
    err = lab.done("train", *TINY, "callbacks.evaluation=null", "logger=mlflow", *nowhere)
    assert err.count("no connection to 127.0.0.1") == 1
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_several_runs_may_open_a_new_database_at_once(tmp_path, mlflow):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    pipes = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", OPENING]
    runs = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b", "c")]
    for run in runs:
        assert "mlflow server" in run.communicate()[0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow/mlflow.db")
    found = client.search_runs(["1"])
    assert {run.data.tags["diffusion_lab.run_id"] for run in found} == {"a", "b", "c"}
    assert {run.info.status for run in found} == {"FINISHED"}


@pytest.mark.slow
def test_a_trackio_run_continues_when_it_is_resumed_and_has_its_pictures(
    lab, tmp_path, killed_at_step, monkeypatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read once a process
    pytest.importorskip("trackio")
    project = f"test-{os.getpid()}"
    own = [f"logger.trackio.project={project}", "logger.trackio.tags=[first,cpu]"]
    killed_at_step(6, *COMMAND, "logger=trackio", *own)
    lab.done("train", "resume=outputs/net/run", "trainer.max_steps=10")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs(project)
    assert name.startswith("fashion_mnist_dit/run-")
    steps: dict[int, dict] = {}
    for row in SQLiteStorage.get_logs(project, name):
        values = steps.setdefault(row["step"], {})
        new = {key: value for key, value in row.items() if key not in ("step", "timestamp")}
        assert not new.keys() & values.keys() - {"images", "seconds"}
        values |= new
    folder = Path("outputs/net/run")
    expected = by_step(folder)
    for step, values in steps.items():
        own = {key: value for key, value in values.items() if not key.startswith(("grids", "summ"))}
        row = expected.get(step, {"images": 8 * step})
        assert without_times(own) == pytest.approx(row, rel=1e-6)
    assert steps.keys() >= expected.keys()
    assert steps[10]["summary/parameters"] == summary_of(folder)["parameters"]
    config = SQLiteStorage.get_run_config(project, name)
    assert (config["backbone.width"], config["tags"]) == (32, "first, cpu")
    assert {step for step, row in steps.items() if "grids/samples" in row} == {2, 4, 6, 8, 10}
    assert "step 4" in steps[4]["grids/samples"]["caption"]
