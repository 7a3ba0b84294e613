"""Launchers of sweeps: joblib runs jobs at once, and launchers that are missing are named."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.tiny_runs import TINY


@pytest.mark.slow
def test_jobs_have_a_folder_each_and_share_the_cores(lab, monkeypatch, joblib):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, _, err = lab("train", *TINY, *joblib, "seed=0,1", "name=x", "callbacks.evaluation=null")
    assert code == 0, err
    runs = sorted(Path("outputs/x").iterdir())
    assert len(runs) == 2
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["finished"], summary["steps"]) == (True, 4)
        assert summary["threads"] == max(1, os.cpu_count() // 2)
    groups = {
        line
        for run in runs
        for line in (run / "config.yaml").read_text().splitlines()
        if "  group: " in line
    }
    assert len(groups) == 1


@pytest.mark.skipif(find_spec("ray") is not None, reason="it is there")
def test_a_launcher_whose_plugin_is_missing_is_named(refusal):
    assert "pip install 'diffusion-lab[ray]'" in refusal(
        "train", *TINY, "hydra/launcher=ray", "name=x"
    )
    assert not Path("outputs").exists()


def test_slurm_without_sbatch_is_named(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch" in refusal("train", *TINY, "hydra/launcher=slurm", "name=x")
    assert not Path("outputs").exists()


def test_a_launcher_has_a_sweep_wherever_configurations_are(lab, monkeypatch):
    started = []
    program = sys.modules["diffusion_lab.cli.program"]
    monkeypatch.setattr(program.sweeps, "sweep", lambda name, arguments: started.append(arguments))
    monkeypatch.setattr(program, "run", lambda name, arguments: started.append(arguments))
    launcher = "hydra/launcher=joblib"
    for flags in ([], ["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]):
        lab("train", *flags, launcher)
        assert started.pop() == [*flags, launcher, "-m"]
    lab("train", launcher, "--cfg", "job")
    assert started.pop() == [launcher, "--cfg", "job"]


@pytest.mark.slow
def test_ray_trains_two_jobs(lab):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs diffusion-lab[ray]")
    quick = ["callbacks.evaluation=null", "logger=none"]
    code, _, err = lab("train", *TINY, *quick, "hydra/launcher=ray", "seed=0,1", "name=x")
    assert code == 0, err
    runs = sorted(Path("outputs/x").iterdir())
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert [(each["finished"], each["steps"]) for each in summaries] == [(True, 4), (True, 4)]
    configs = [(run / "config.yaml").read_text() for run in runs]
    assert sorted("seed: 1\n" in config for config in configs) == [False, True]
