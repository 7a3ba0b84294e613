"""The command `sync` finds offline W&B runs and uploads them, here to a fake W&B server."""

import json
import os

import pytest
from helpers.fake_wandb_server import serving
from helpers.refusals import refused
from helpers.tiny_runs import TINY

from diffusion_lab.analysis import wandb_sync
from diffusion_lab.runs.progress import locked

QUICK = ["callbacks.evaluation=null", "logger.wandb.mode=offline"]


@pytest.fixture
def offline_run(tmp_path):
    """Makes the file of a run as W&B leaves it, but empty; its folder has the time and id."""

    def make(name, uploaded=False):
        folder = tmp_path / "outputs/net/wandb" / name
        folder.mkdir(parents=True)
        file = folder / f"run-{name.rpartition('-')[2]}.wandb"
        file.write_bytes(b"")
        if uploaded:
            file.with_suffix(".wandb.synced").touch()
        return file

    return make


@pytest.fixture
def planned(lab):
    """Runs `sync dry_run=true` on paths; returns by run id whether each run is uploaded."""

    def found(*paths):
        listed = lab.result("sync", *paths, "dry_run=true")
        return {path.rpartition("-")[2]: uploaded for path, uploaded in listed.items()}

    return found


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
def test_a_run_and_what_it_was_resumed_to_become_one_on_the_server(lab, tmp_path, monkeypatch):
    lab.done("train", *TINY, *QUICK, "run_dir=run", "logger.wandb.run_id=tiny")
    lab.done("train", "resume=run", "trainer.max_steps=6")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        result = lab.result("sync", "run")
        assert list(result.values()) == [True, True]
        lab.done("sync", "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in lines if "train/loss" in row}
    sent = [row for _, row in sorted(server.history["tiny"].items())]
    assert {row["_step"]: row["train/loss"] for row in sent} == losses
    assert [row["_step"] for row in sent] == [1, 2, 3, 4, 5, 6]
    assert server.configs["tiny"]["choices"]["value"]["backbone"] == "dit"
    assert [name for name in server.files if name.startswith("media/images/grids/samples")]
    # W&B ends the name of a table with random letters where its key has a slash
    assert [name[:-7] for name in server.artifacts] == ["run-tiny-gridstable"] * 2


def test_what_is_uploaded_is_told_from_what_is_not_or_has_grown(planned, offline_run, no_key):
    offline_run("offline-run-20260101_000001-aaa", uploaded=True)
    grown = offline_run("offline-run-20260101_000002-bbb", uploaded=True)
    waiting = offline_run("offline-run-20260101_000003-ccc")
    online = offline_run("run-20260101_000004-ddd")
    os.utime(grown.with_suffix(".wandb.synced"), (0, 0))
    assert planned() == {"aaa": True, "bbb": False, "ccc": False}
    assert planned(str(online.parent), str(waiting)) == {"ccc": False, "ddd": False}
    (run,) = wandb_sync.find([waiting])
    assert run.name == "run-ccc.wandb"


def test_runs_that_are_abandoned_or_being_trained_are_left_out(planned, tmp_path, no_key):
    runs = [tmp_path / f"outputs/{name}" for name in ("net/a", "net/b", "net/.abandoned/a")]
    for run in runs:
        folder = run / f"wandb/offline-run-20260101_000001-{run.parent.name}_{run.name}"
        folder.mkdir(parents=True)
        (folder / f"run-{run.name}.wandb").write_bytes(b"")
    with locked(runs[1]):
        assert planned() == {"net_a": False}
    (tmp_path / "disk").symlink_to(tmp_path / "outputs/net", target_is_directory=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/net").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert planned("linked") == {"net_a": False, "net_b": False}
    # a run that is named explicitly is uploaded in any case
    chosen = planned("outputs/net/b", "outputs/net/.abandoned/a")
    assert chosen == {"net_b": False, ".abandoned_a": False}


def test_nothing_to_upload_is_no_error(lab, tmp_path):
    (tmp_path / "outputs").mkdir()
    result = lab.result("sync")
    assert result == {}


def test_what_cannot_be_uploaded_is_said(refusal, offline_run, no_key, monkeypatch):
    waiting = offline_run("offline-run-20260101_000001-aaa")
    assert "wandb login" in refusal("sync")
    assert __file__ in refusal("sync", __file__)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert "127.0.0.1" in refusal("sync")
    assert not waiting.with_suffix(".wandb.synced").exists()


def test_a_failed_upload_is_no_success(offline_run, monkeypatch):
    files = [offline_run(f"offline-run-20260101_00000{i}-a{i}") for i in range(2)]

    def half(arguments, **_):
        assert [str(file) for file in files] == arguments[-2:]
        files[0].with_suffix(".wandb.synced").touch()

    monkeypatch.setattr(wandb_sync.subprocess, "run", half)
    with refused("1 of 2"):
        wandb_sync.upload(wandb_sync.find([file.parents[1] for file in files]))
