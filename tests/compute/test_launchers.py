"""Launchers of sweeps: joblib runs jobs at once, SLURM's may leave them, a missing one is named."""

import os
import re
import sys
from pathlib import Path

import pytest
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, TINY, summary_of

from diffusion_lab.runs import load_config, sweep_record

STUDY = ["train", "-m", *QUICK, "study_name=mine", "seed=0,1"]
LEAVE = ["hydra/launcher=slurm", "hydra.launcher.wait=false"]


@pytest.mark.slow
def test_jobs_have_a_folder_each_and_share_the_cores(lab, monkeypatch, joblib):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lab.done("train", *TINY, *joblib, "seed=0,1", "name=x", "callbacks.evaluation=null")
    runs = sorted(Path("outputs/x").iterdir())
    assert len(runs) == 2
    for run in runs:
        summary = summary_of(run)
        assert (summary["finished"], summary["steps"]) == (True, 4)
        assert summary["threads"] == max(1, os.cpu_count() // 2)
    assert len({load_config(run).logger.wandb.group for run in runs}) == 1


def test_slurm_without_sbatch_is_named(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch" in refusal("train", *TINY, "hydra/launcher=slurm", "name=x")
    assert not Path("outputs").exists()


def test_a_launcher_has_a_sweep_wherever_configurations_are(lab, monkeypatch):
    started = []
    program = sys.modules["diffusion_lab.cli.program"]
    monkeypatch.setattr(
        "diffusion_lab.cli.sweeps.sweep", lambda name, arguments: started.append(arguments)
    )
    monkeypatch.setattr(program, "run", lambda name, arguments: started.append(arguments))
    launcher = "hydra/launcher=joblib"
    for flags in ([], ["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]):
        lab("train", *flags, launcher)
        assert started.pop() == [*flags, launcher, "-m"]
    lab("train", launcher, "--cfg", "job")
    assert started.pop() == [launcher, "--cfg", "job"]


@pytest.mark.slow
def test_jobs_are_submitted_left_and_not_submitted_twice(lab, refusal, fake_slurm):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    err = lab.done(*STUDY, *LEAVE)
    assert "diffusion-lab status outputs/mine" in err
    assert fake_slurm.submissions == 1  # an array
    (sweep,) = sweep_record.of_study(Path("outputs/mine"))
    assert [job.slurm for job in sweep] == ["17_0", "17_1"]
    assert not list(Path("outputs/mine").glob("*/config.yaml"))

    fake_slurm.says("17_1|RUNNING|None")
    for again in (["seed=0,1"], ["seed=1,2"]):
        said = refusal(*STUDY[:-1], *again, *LEAVE)
        assert_names(said, "1 of these 2", "scancel 17_1")
    lab(*STUDY[:-1], "seed=2,3", *LEAVE)
    assert fake_slurm.submissions == 2

    fake_slurm.says()
    lab.done(*STUDY)
    for jobs, trained in zip(sweep_record.of_study(Path("outputs/mine")), (2, 0, 2), strict=True):
        assert sum((job.folder / "config.yaml").is_file() for job in jobs) == trained
    lab.done(*STUDY, *LEAVE)
    assert fake_slurm.submissions == 2


def test_a_single_job_and_jobs_without_a_study_are_left_as_well(lab, fake_slurm):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    lab.done("train", *QUICK, "name=x", *LEAVE)
    (sweep,) = Path("outputs/multirun").iterdir()
    jobs = sweep_record.read(sweep / "sweep.json")
    assert [(job.slurm, job.folder) for job in jobs] == [("17", None)]


@pytest.mark.parametrize(("resources", "asked"), [("(null)", None), ("gpu:a100:4(S:0-1)", "2")])
def test_gpus_are_requested_where_the_cluster_has_some(lab, fake_slurm, resources, asked):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    fake_slurm.program("sinfo", f"echo '{resources}'")
    lab.done("train", *QUICK, "name=x", *LEAVE, "hydra.launcher.tasks_per_node=2")
    found = re.search(r"--gpus-per-node=(\d+)", fake_slurm.script)
    assert (found and found[1]) == asked


def test_a_search_cannot_be_left(refusal, fake_slurm):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hparams_search=optuna", "study_name=mine", "lr_schedule=constant,cosine"]
    assert "hydra.launcher.wait" in refusal("train", "-m", *QUICK, *search, *LEAVE)
    assert fake_slurm.submissions == 0
    assert not Path("outputs").exists()
