"""A run that starts from the weights of another one, of which it takes what fits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.fake_runs import fake_group
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, same, summary_of
from omegaconf import OmegaConf

from diffusion_lab import runs
from diffusion_lab.diffusion.objective.loss import MeanFlow
from diffusion_lab.families.diffusion.initial_weights import (
    InitialWeights,
    differences,
    starts_anew,
)
from diffusion_lab.report.frame import collect
from diffusion_lab.runs import current, weights
from diffusion_lab.runs.summary import Summary

RUN = [*QUICK, "optimizer.lr=0.1", "lr_schedule.warmup_images=0", "run_dir=run"]
# a rate so small that float32 weights do not change
STILL = [*QUICK, "optimizer.lr=1e-30", "callbacks.weight_averaging=null", "run_dir=new"]


class OwnFlow(MeanFlow):
    """A user's loss."""


@pytest.fixture
def old(trained_once):
    """The folder of a run that is trained."""
    return trained_once("train", *RUN) / "run"


def state_of(folder):
    """The weights that a run evaluates."""
    return weights.load_weights(weights.WeightsChoice(folder))[0]


def started(lab, *overrides):
    """Trains a run in the folder `new`, at a rate of 0; returns what it said."""
    return lab.done("train", *STILL, *overrides)


@pytest.mark.long
def test_a_run_starts_from_the_weights_that_another_evaluates(lab, old, tmp_path):
    said = started(lab, f"init_from={old}")
    first, second = state_of(old), state_of(tmp_path / "new")
    assert same(first, second)
    saved = runs.load_config(tmp_path / "new")
    assert saved.init_sha256 == current.sha256_of(old)
    before, summary = runs.load_summary(old), runs.load_summary(tmp_path / "new")
    assert summary.began_from_images == before.images_seen > 0
    assert "trained with another" not in said
    assert before.began_from_images is before.began_from_flops is None
    passes = 2 * before.forward_passes * before.images_seen
    assert summary.began_from_flops == passes * before.macs > 0
    lab.done("train", "resume=new", f"trainer.max_steps={summary.steps + 1}")
    resumed = runs.load_summary(tmp_path / "new")
    assert resumed.began_from_images == before.images_seen
    assert resumed.began_from_flops == summary.began_from_flops
    twice = 1 + resumed.images_seen / before.images_seen
    assert resumed.flops_behind(False) == pytest.approx(twice * summary.began_from_flops)
    assert replace(resumed, began_from_flops=None).flops_behind(False) is None
    assert resumed.images_behind(False) == before.images_seen + resumed.images_seen
    assert resumed.jumps is False
    # a job that died before its first checkpoint starts from the weights again
    saved.resume = str(tmp_path / "new")
    assert InitialWeights.configured(saved) is None
    shutil.rmtree(tmp_path / "new/checkpoints")
    assert InitialWeights.configured(saved).sha256 == saved.init_sha256


@pytest.mark.slow
def test_an_export_and_a_file_give_the_same(lab, old, tmp_path):
    lab.done("export", f"run={old}", "output=mine")
    for source in ("mine", "mine/model.safetensors"):
        started(lab, f"init_from={source}", f"run_dir={source.replace('/', '_')}_new")
    first = state_of(tmp_path / "mine")
    for name in ("mine_new", "mine_model.safetensors_new"):
        assert same(first, state_of(tmp_path / name))


@pytest.mark.long
def test_what_does_not_fit_or_was_told_the_level_otherwise_is_said(lab, old, tmp_path):
    large = "data.source._target_=helpers.other_tiny.LargeTiny"
    network = ["backbone.depth=2", "conditioning=none", "objective=mean_flow"]
    said = started(lab, f"init_from={old}", large, *network)
    first, second = state_of(old), state_of(tmp_path / "new")
    shared = [n for n in first if n in second and first[n].shape == second[n].shape]
    left = {n for n in first.keys() | second.keys() if n not in shared}
    assert shared
    assert all(torch.equal(first[name], second[name]) for name in shared)
    reasons = ("of another shape there", "not there", "only there")
    assert_names(said, f"{len(shared)} of {len(second)}", *reasons, *sorted(left)[:1])
    assert "denoiser.noise_label" in said.split("trained with another", 1)[1]
    assert "schedule" not in said.split("trained with another", 1)[1].split(",")[0]


@pytest.mark.slow
def test_a_resumed_run_needs_the_other_one_no_longer(lab, old, tmp_path):
    lab.done("export", f"run={old}", "output=mine")
    started(lab, "init_from=mine")
    (tmp_path / "mine/model.safetensors").unlink()
    lab.done("train", "resume=new", "trainer.max_steps=30")
    assert summary_of(tmp_path / "new")["steps"] == 30
    lab.done("sample", "run=new", "num_samples=2")


def test_other_weights_make_another_composition(tmp_path):
    for name in ("a", "b"):
        given = {"init_from": "moved", "init_sha256": name}
        fake_group(tmp_path, name, [100.0, 101.0], config=given)
    assert len(collect([tmp_path]).arms) == 2


@pytest.mark.parametrize("source", ["nothing", "empty", "broken.safetensors", "other.safetensors"])
def test_weights_that_cannot_be_used_are_refused_before_training(refusal, tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    sentence = refusal("train", *STILL, f"init_from={source}")
    assert_names(sentence, f"init_from={source}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("other", ["ours", "theirs"])
def test_a_loss_of_the_user_s_that_inherits_from_mean_flow_has_its_noise_label(other):
    """The class says which label it needs, whatever its name."""
    plain = {"_target_": "diffusion_lab.diffusion.objective.loss.MeanFlow"}
    own = {"_target_": f"{__name__}.OwnFlow"}
    ours, theirs = (plain, own) if other == "theirs" else (own, plain)
    common = {"schedule": {"_target_": "diffusion_lab.diffusion.schedule.Rectified"}}
    cfgs = []
    for loss, label in ((ours, "auto"), (theirs, "auto"), (None, "auto"), (None, "data_time")):
        parts = {"objective": {"loss": loss}, "denoiser": {"noise_label": label}}
        cfgs.append(OmegaConf.create(common | parts))
    assert differences(cfgs[0], cfgs[1]) == ()
    assert differences(cfgs[0], cfgs[2]) == ("denoiser.noise_label",)
    assert differences(cfgs[0], cfgs[3]) == ()


@pytest.mark.parametrize(
    ("start", "teacher", "anew"),
    [
        (None, None, True),
        ("flow", None, False),
        ("flow", "other", False),
        ("flow", "flow", True),
        ("flow/", "./flow", True),
        (str(Path("flow").absolute()), "flow", True),
    ],
)
def test_a_run_starts_anew_from_no_weights_or_its_teacher_s(start, teacher, anew):
    cfg = {"init_from": start, "objective": {"teacher": teacher and {"run": teacher}}}
    assert starts_anew(OmegaConf.create(cfg)) is anew


def test_weights_of_the_teacher_count_once():
    own = {"macs": 2, "forward_passes": 3, "images_seen": 10}
    before = {"began_from_images": 40, "began_from_flops": 480}
    teacher = {"teacher_images": 40, "teacher_calls": 5, "teacher_macs": 2}
    summary = Summary(**own, **before, **teacher)
    own, of_teacher = 2 * 2 * 3 * 10, 2 * 2 * (3 * 40 + 5)
    assert (summary.images_behind(True), summary.images_behind(False)) == (50, 90)
    assert summary.flops_behind(True) == own + of_teacher
    assert summary.flops_behind(False) == own + of_teacher + 480
    for unknown in ("macs", *teacher):
        assert replace(summary, **{unknown: None}).flops_behind(True) is None
