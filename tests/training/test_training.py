"""Training from the command line to the files, on tiny data."""

import json
import os
import signal

import pytest
import torch
import yaml
from helpers.faults import Killed, at_step, die
from helpers.tiny_runs import TINY, rows
from PIL import Image

from diffusion_lab import runs
from diffusion_lab.families.diffusion.module import DiffusionModule


def test_a_run_leaves_everything_it_promises(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 4
    assert summary["images_seen"] == 32
    assert summary["versions"]["torch"] == torch.__version__
    name = "efficientnet_lite0-96/train64-16"
    for metric in (f"fid/{name}", f"fid_real/{name}", f"kid/{name}", f"kid_real/{name}"):
        assert isinstance(summary["metrics"][metric], float)
    assert 0 < summary["metrics"]["val/loss"] < 10

    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["backbone"]["width"] == 32
    assert config["logger"]["wandb"]["run_id"]

    with Image.open(run_folder / "samples/step_0000004.png") as picture:
        # 4 classes x 2 columns of 8 px, gaps of 2, doubled: one row per class
        assert picture.size == (2 * (2 * 10 + 2), 2 * (4 * 10 + 2))


def test_rows_carry_their_axes_and_the_fixed_names(run_folder):
    found = rows(run_folder)
    keys = set().union(*found)
    assert {"train/loss", "train/lr", "train/images_per_second", "val/loss"} <= keys
    assert "val_by_level/t0.05" in keys
    assert "val_by_level/t0.95" in keys
    for row in found:
        assert row["images"] == row["step"] * 8
        assert row["seconds"] >= 0
    losses = [row["step"] for row in found if "train/loss" in row]
    assert losses == sorted(set(losses))


def test_checkpoint_holds_the_averaged_weights_and_loads_safely(run_folder):
    checkpoint = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)
    _, model = runs.load(run_folder)
    assert not model.denoiser.training  # dropout would change samples
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, averaged[f"denoiser.{name}"])


def kill_at_step(step, monkeypatch):
    """Makes training die when this step begins."""
    at_step(monkeypatch, step, die)


QUIET = ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]


def test_the_same_seed_trains_the_same_model_whoever_watches(lab, run_folder):
    code, _, err = lab("train", *TINY, *QUIET, "run_dir=again")
    assert code == 0, err
    folders = (run_folder, run_folder.parent / "again")
    a, b = (runs.load(folder)[1].denoiser.state_dict() for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_gives_the_same_steps_and_rows(lab, tmp_path):
    code, _, err = lab("train", *TINY, *QUIET, "run_dir=acc", "micro_batch_size=2")
    assert code == 0, err
    summary = json.loads((tmp_path / "acc/summary.json").read_text())
    assert (summary["steps"], summary["images_seen"]) == (4, 32)


@pytest.mark.parametrize("micro", ["null", "4"])
@pytest.mark.parametrize("checkpoint", ["of the end", "in the middle"])
def test_resuming_equals_never_having_stopped(
    lab, tmp_path, monkeypatch, trained_once, micro, checkpoint
):
    common = [*TINY, *QUIET, f"micro_batch_size={micro}"]
    whole = trained_once("train", *common, "run_dir=run", "trainer.max_steps=6")
    if checkpoint == "of the end":
        assert lab("train", *common, "run_dir=parts", "trainer.max_steps=3")[0] == 0
    else:  # killed at step 5, after the checkpoint of step 3
        kill_at_step(5, monkeypatch)
        common += ["trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=3"]
        with pytest.raises(Killed):
            lab("train", *common, "run_dir=parts")
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    code, _, err = lab("train", "resume=parts", "trainer.max_steps=6")
    assert code == 0, err
    steps = [row["step"] for row in rows(tmp_path / "parts") if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    states = []
    for folder in (whole / "run", tmp_path / "parts"):
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 6
        states.append(checkpoint)
    for part in ("state_dict", "current_model_state"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def test_a_finished_run_is_not_trained_again_by_mistake(refusal, run_folder):
    before = (run_folder / "summary.json").read_bytes()
    assert "trainer.max_steps above 4" in refusal("train", "resume=run")
    assert (run_folder / "summary.json").read_bytes() == before


def names_and_steps(folder):
    return [(row["step"], set(row)) for row in rows(folder)]


def test_a_run_killed_in_its_last_evaluation_gets_its_metrics_when_resumed(lab, run_folder):
    whole = json.loads((run_folder / "summary.json").read_text())
    logged = names_and_steps(run_folder)
    (run_folder / "summary.json").unlink()
    code, _, err = lab("train", "resume=run")
    assert code == 0, err
    again = json.loads((run_folder / "summary.json").read_text())
    assert again["metrics"] == pytest.approx(whole["metrics"])
    assert again["wall_seconds"] >= whole["wall_seconds"] / 2
    assert names_and_steps(run_folder) == logged, "metrics that are measured again have one row"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_says_how_to_resume(lab, tmp_path, monkeypatch, number):
    original = DiffusionModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", interrupted)
    code, _, err = lab("train", *TINY, *QUIET, "run_dir=run", "trainer.max_steps=100")
    assert code == 130
    assert "diffusion-lab train resume=run" in err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (False, 3)
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


def test_resume_changes_lengths_but_not_the_model(refusal, run_folder):
    assert "batch_size=16" in refusal("train", "resume=run", "trainer.max_steps=9", "batch_size=16")


@pytest.mark.parametrize("suffix", ["", "/checkpoints"])
def test_a_folder_that_is_no_run_is_named(refusal, tmp_path, suffix):
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for command in (["sample"], ["evaluate"], ["train"]):
        key = "resume" if command == ["train"] else "run"
        assert "config.yaml" in refusal(*command, f"{key}=empty{suffix}")


def test_a_damaged_checkpoint_is_named(refusal, run_folder):
    path = run_folder / "checkpoints/last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    assert "last.ckpt" in refusal("sample", "run=run")


def test_a_new_run_never_overwrites_another(refusal, run_folder):
    before = (run_folder / "metrics.jsonl").read_bytes()
    assert "run_dir=run" in refusal("train", *TINY, "run_dir=run")
    assert (run_folder / "metrics.jsonl").read_bytes() == before
