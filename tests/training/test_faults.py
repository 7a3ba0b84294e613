"""Runs end in a defined way when a data process, W&B, a disk or a rank fails."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
import wandb
from helpers.paths import ROOT, TESTS
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import QUICK, TINY, steps_of, summary_of
from torch._inductor.exc import InvalidCxxCompiler

from diffusion_lab.common.files import write_atomically
from diffusion_lab.runs import checkpoints
from diffusion_lab.training.callbacks import SampleGrid
from diffusion_lab.training.train import explaining_failures

HOME = {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "WANDB_MODE": "offline"}


def run(folder, *arguments):
    """Runs `diffusion-lab train` as a process of its own."""
    command = [sys.executable, "-m", "diffusion_lab", "train", *arguments]
    env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | HOME
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=env)


def test_a_killed_data_process_ends_the_run_with_a_sentence(refusal, tmp_path):
    data = [*QUICK, "data._target_=helpers.failing.DyingWorkers"]
    every = ["callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=50"]
    sentence = refusal("train", *data, *every, "run_dir=run")
    assert "diffusion-lab train resume=run" in sentence
    assert checkpoints.newest_intact(tmp_path / "run")


def test_a_w_and_b_that_does_not_start_is_left_alone(lab, tmp_path, monkeypatch):
    gone = wandb.errors.CommError("the server is gone")
    monkeypatch.setattr(wandb, "init", Mock(side_effect=gone))
    err = lab.done("train", *QUICK, "logger=wandb", "run_dir=run")
    assert err.count("the server is gone") == 1
    assert "W&B" in err
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert summary_of(tmp_path / "run")["finished"] is True
    assert wandb.run is None  # else the next run of a sweep would write into it


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), EOFError()])
def test_a_data_process_that_dies_in_the_middle_of_a_batch_is_told_as_one(error):
    with refused("process that loads data"), explaining_failures("train", None):
        raise error


@pytest.mark.parametrize("last", [RuntimeError("unexpected pos 3 vs 2"), TypeError("callable")])
def test_a_data_process_that_dies_in_the_midst_of_other_work_is_told_as_one(last):
    with refused("process that loads data"), explaining_failures("train", None):
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        finally:
            raise last


def test_a_full_device_and_a_missing_compiler_are_told_with_what_helps(tmp_path):
    with refused("micro_batch_size", "activation"), explaining_failures("train", tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with refused("compile=false", "g++"), explaining_failures("train", tmp_path):
        try:
            raise InvalidCxxCompiler("g++")
        except InvalidCxxCompiler as error:
            raise RuntimeError("the backend failed") from error


@pytest.mark.slow
def test_a_w_and_b_process_that_is_killed_does_not_hold_training_up(tmp_path):
    arguments = [a for a in QUICK if a != "logger=none"]
    killing = ["+callbacks.kill._target_=helpers.failing.KilledService"]
    start = time.monotonic()
    done = run(tmp_path, *arguments, *killing, "run_dir=run").communicate(timeout=100)[1]
    assert "killed 1 service" in done
    assert "run/summary.json" in done
    assert time.monotonic() - start < 90
    assert {1, 2, 3, 4} <= set(steps_of(tmp_path / "run", "step"))


def test_a_picture_that_cannot_be_written_ends_the_run_with_a_sentence(refusal, monkeypatch):
    def run(self, trainer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step_0000002.png")

    monkeypatch.setattr(SampleGrid, "run", run)
    arguments = [a for a in QUICK if "sample_grid" not in a]
    every = ["callbacks.sample_grid.every_n_steps=2", "callbacks.checkpoint.every_n_steps=1"]
    sentence = refusal("train", *arguments, *every, "run_dir=run")
    full = os.strerror(errno.ENOSPC)
    assert_names(sentence, "step_0000002.png", full, "diffusion-lab train resume=run")


def test_what_is_written_names_its_file_where_the_disk_is_full(tmp_path, small_files):
    with refused("big.bin", os.strerror(errno.EFBIG)), explaining_failures("train", tmp_path):
        write_atomically(tmp_path / "big.bin", bytes(50_000))
    assert list(tmp_path.iterdir()) == []


DYING = "+callbacks.dying._target_=helpers.failing.DyingRank"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "named"), [("raise", "code 1"), ("kill", "SIGKILL")])
def test_no_rank_is_left_waiting_for_one_that_died(lab, tmp_path, how, named):
    dying = [DYING, f"+callbacks.dying.how={how}"]
    every = ["callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=1000", "run_dir=run"]
    start = time.monotonic()
    code, _, err = lab("train", *QUICK, *dying, *every, "trainer.devices=2")
    assert time.monotonic() - start < 120
    assert code == 2
    sentences = [line for line in err.splitlines() if line.startswith("diffusion-lab:")]
    assert len(sentences) == 1, err
    assert_names(sentences[0], "process 1", named, "resume=run")
    assert err.count("Traceback") == (how == "raise")  # the fault itself, and no other
    path = checkpoints.newest_intact(tmp_path / "run")
    assert torch.load(path, weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_not_waited_for_without_end(tmp_path):
    silent = [DYING, "+callbacks.dying.how=silent"]
    every = ["callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=1000", "run_dir=run"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = str(TESTS / "helpers/impatient.py")
    command = [sys.executable, "-m", *torchrun, program, "train", *QUICK, *silent, *every]
    pipes = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | HOME, check=False, **pipes)
    assert done.returncode != 0
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("diffusion-lab:")]
    assert "resume=run" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_two_ranks_saves_the_run(tmp_path, number):
    arguments = [*QUICK, "run_dir=run", "trainer.max_steps=100000", "trainer.devices=2"]
    process = run(tmp_path, *arguments)
    rows = tmp_path / "run/metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not rows.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "diffusion-lab train resume=run" in err
    assert "Traceback" not in err
    summary = summary_of(tmp_path / "run")
    assert summary["finished"] is False
    saved = torch.load(tmp_path / "run" / checkpoints.LAST, weights_only=True)
    assert saved["global_step"] == summary["steps"]


DIVERGING = "guidance.scale=1e300"  # infinite as float32
BAD = "samples are not finite"


@pytest.mark.usefixtures("run_folder")
def test_a_sweep_leaves_out_the_settings_that_draw_them(lab):
    code, out, err = lab("sample-sweep", "run=run", "guidance.scale=1,1e300", "json=true")
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
