"""Trackio's runs are read back from its database."""

import os
from pathlib import Path

import pytest
from helpers.logged_rows import by_step, without_times
from helpers.tiny_runs import TINY, summary_of

RESUMED = ["trainer.max_steps=8", "trainer.log_every_n_steps=3", "validate_every_n_steps=4"]
RESUMED += ["callbacks.checkpoint.every_n_steps=2", "callbacks.sample_grid.every_n_steps=2"]
COMMAND = ["train", *TINY, *RESUMED, "callbacks.evaluation=null", "run_dir=outputs/net/run"]


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
        assert without_times(own) == pytest.approx(
            expected.get(step, {"images": 8 * step}), rel=1e-6
        )
    assert steps.keys() >= expected.keys()
    assert steps[10]["summary/parameters"] == summary_of(folder)["parameters"]
    config = SQLiteStorage.get_run_config(project, name)
    assert (config["backbone.width"], config["tags"]) == (32, "first, cpu")
    assert {step for step, row in steps.items() if "grids/samples" in row} == {2, 4, 6, 8, 10}
    assert "step 4" in steps[4]["grids/samples"]["caption"]
