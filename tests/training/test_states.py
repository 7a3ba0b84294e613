"""Runs with each kind of state go on from their middle exactly, and train alike on two ranks."""

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.pairs import first_fast
from helpers.ranks import on_two_ranks
from helpers.tiny_runs import (
    ALONE,
    FAMILIES,
    PLAIN,
    QUICK,
    TINY_AUTOENCODER,
    checkpoint_of,
    require_equal_training,
    rows,
    same,
    summary_of,
    tiny_first_stage,
)

from diffusion_lab.first_stage.autoencoder import saving

LEARNED = [
    "objective/time_sampler=second_moment",
    "objective.time_sampler.bins=2",
    "objective.time_sampler.history=2",
    "objective/loss/uncertainty=learned",
    "objective.loss.uncertainty.channels=8",
    "denoiser.self_conditioning=true",
]
ADVERSARIAL = ["reconstruction=perceptual_adversarial", "reconstruction.discriminator.channels=8"]
ADVERSARIAL += ["reconstruction.discriminator.start=1", "reconstruction.perceptual.size=16"]
AUTOENCODER = ["train-autoencoder", *TINY_AUTOENCODER, *ALONE[:2]]
PLANE = ["experiment=toy/score_matching", "trainer.accelerator=cpu", "batch_size=32", *ALONE]
PLANE += ["backbone.width=16", "trainer.max_steps=4", "trainer.log_every_n_steps=1"]
EDM2 = ["backbone=edm2", "backbone.channels=8", "backbone.multipliers=[1,2]", "optimizer=adam"]
EDM2 += ["backbone.attention=[1]", "backbone.head_channels=8", "objective.label_dropout=0.3"]
EDM2 += ["callbacks.posthoc_ema.snapshots=2"]
MUON = ["optimizer=muon", "optimizer.weight_decay=0.1", "lr_schedule=inverse_sqrt"]
HISTORY, TARGET = "objective.time_sampler.history", "denoiser.target.last.weight"
STATES = {  # a run with each kind of state, and a weight that it must have learned
    "micro-batches": (["train", *QUICK, "micro_batch_size=4"], None),
    "muon": (["train", *QUICK, *MUON], None),
    "alignment": (
        ["train", *QUICK, "alignment=efficientnet_lite0", "alignment.width=16"],
        "alignment.projector.0.weight",
    ),
    "mean_flow": (
        ["train", *QUICK, "objective=mean_flow", "objective.loss.guidance=1.5"],
        TARGET,
    ),
    "improved_mean_flow": (
        ["train", *QUICK, "objective=improved_mean_flow", "objective.loss.guidance=8"],
        TARGET,
    ),
    "alpha_flow": (
        ["train", *QUICK, "objective=alpha_flow", "objective.loss.end_images=24"],
        TARGET,
    ),
    "lagrangian": (["train", *QUICK, "objective=lagrangian"], TARGET),
    "gan": (["train", *PLAIN, *FAMILIES["gan"], *ALONE], None),
    "codes": (["train", *PLAIN, *FAMILIES["autoregressive"], *ALONE], None),
    "adversary": ([*AUTOENCODER, *ADVERSARIAL], "loss.discriminator.layers.0.weight"),
    "vq": ([*AUTOENCODER, "autoencoder=vq", "autoencoder.codes=8"], None),
    "learned": (["train", *QUICK, *LEARNED], HISTORY),
    "variance": (
        ["train", *QUICK, "objective=improved_ddpm", "schedule=ddpm_linear"],
        None,
    ),
    "shortcut": (["train", *QUICK, "objective=shortcut"], TARGET),
    "ect": (["train", *QUICK, "objective=ect", "schedule=edm"], None),
    "score matching": (["train", *PLANE], None),
    "edm2": (["train", *PLAIN, *ALONE, *EDM2], None),
}


@pytest.mark.parametrize("name", first_fast(STATES, 7))
def test_a_run_that_goes_on_from_its_middle_ends_as_the_whole(lab, tmp_path, name):
    arguments, learned = STATES[name]
    autoencoder = arguments[0] == "train-autoencoder"
    tiny_first_stage(tmp_path / "stage", "vq")
    kept = ["callbacks.checkpoint.keep_every_n_steps=2", "optimizer.lr=0.01"]
    lab.done(*arguments, *kept, "lr_schedule.warmup_images=0", "run_dir=run")
    whole, parts = tmp_path / "run", Path(shutil.copytree(tmp_path / "run", tmp_path / "parts"))
    weights = "state_dict" if autoencoder else "current_model_state"
    state = checkpoint_of(whole)[weights]
    assert learned is None or state[learned].abs().sum() > 0
    # as a kill after the second of four steps leaves it
    (parts / "checkpoints/step_0000002.ckpt").replace(parts / "checkpoints/last.ckpt")
    for path in (*parts.glob("checkpoints/previous.ckpt"), *parts.glob("checkpoints/step_*")):
        path.unlink()
    (parts / "summary.json").unlink()
    made = parts / saving.FIRST_STAGE_FILE
    if autoencoder:
        made.unlink()
    assert not same(checkpoint_of(parts)[weights], state)
    lab.done(arguments[0], "resume=parts")
    require_equal_training(whole, parts)
    steps = [row["step"] for row in rows(parts) if "train/loss" in row]
    assert steps == [1, 2, 3, 4]
    if autoencoder:
        assert made.read_bytes() == (whole / saving.FIRST_STAGE_FILE).read_bytes()


def test_a_run_of_more_steps_goes_on_after_its_end(lab, tmp_path):
    common = [*QUICK, "lr_schedule=constant"]  # as a cosine's depends on the run's length
    for folder, steps in (("whole", 6), ("parts", 3)):
        lab.done("train", *common, f"run_dir={folder}", f"trainer.max_steps={steps}")
    lab.done("train", "resume=parts", "trainer.max_steps=6")
    require_equal_training(tmp_path / "whole", tmp_path / "parts")


RANKED = ["alignment", "mean_flow", "shortcut", "ect", "gan", "codes", "edm2", "edm2 muon"]
RANKED += ["improved_mean_flow", "alpha_flow", "lagrangian"]


SHARDED = [name for name in RANKED if name != "gan"]  # which is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"), [*product(RANKED, ["ddp"]), *product(SHARDED, ["fsdp"])]
)
def test_two_ranks_train_the_model_of_one(lab, tmp_path, name, strategy):
    tiny_first_stage(tmp_path / "stage", "vq")
    arguments = [*STATES[name.split()[0]][0], *(MUON[:1] if "muon" in name else [])]
    exact = ["trainer.accelerator=cpu", "trainer.precision=32-true", "micro_batch_size=2"]
    exact += ["optimizer.lr=0.01", "lr_schedule.warmup_images=0", "data.flip=false"]
    lab.done(*arguments, *exact, "run_dir=one")
    several = [*arguments, f"trainer={strategy}", *exact, "trainer.devices=2", "run_dir=two"]
    for ended in on_two_ranks({"x": several}, tmp_path):
        assert ended["x"].code == 0, ended["x"].err
    assert summary_of(tmp_path / "two")["ranks"] == 2
    losses = [
        [row["train/loss"] for row in rows(tmp_path / run) if "train/loss" in row]
        for run in ("one", "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (checkpoint_of(tmp_path / run)["current_model_state"] for run in ("one", "two"))
    # alpha-Flow divides errors, and so their rounding, by alpha
    atol = 1e-3 if name.split()[0] in ("edm2", "alpha_flow") else 1e-4
    torch.testing.assert_close(two, one, rtol=1e-3, atol=atol)
