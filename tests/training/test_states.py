"""Runs with each kind of state go on from their middle, and any layout trains the same model."""

from itertools import product

import pytest
import torch
from helpers.pairs import first_fast
from helpers.ranks import on_two_ranks
from helpers.tiny_runs import (
    ADVERSARIAL,
    ALONE,
    EDM2,
    FAMILIES,
    FAST,
    FEW_CALLS,
    PLAIN,
    QUICK,
    TINY,
    TINY_AUTOENCODER,
    checkpoint_of,
    curve,
    killed_after_two_steps,
    require_equal_training,
    same,
    steps_of,
    summary_of,
    tiny_first_stage,
)

from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.runs.weights import read, snapshot_paths

LEARNED = [
    *("objective/time_sampler=second_moment", "objective.time_sampler.bins=2"),
    *("objective.time_sampler.history=2", "objective/loss/uncertainty=learned"),
    *("objective.loss.uncertainty.channels=8", "denoiser.self_conditioning=true"),
]
AUTOENCODER = ["train-autoencoder", *TINY_AUTOENCODER, *ALONE[:2]]
PLANE = ["experiment=toy/score_matching", "trainer.accelerator=cpu", "batch_size=32", *ALONE]
PLANE += ["backbone.width=16", "trainer.max_steps=4", "trainer.log_every_n_steps=1"]
MUON = ["optimizer=muon", "optimizer.weight_decay=0.1", "lr_schedule=inverse_sqrt"]
ADAM = ["optimizer=adam", "callbacks.posthoc_ema.snapshots=2"]
HISTORY, TARGET = "objective.time_sampler.history", "denoiser.target.last.weight"
STATES = {  # a run with each kind of state, and a weight that it must have learned
    "micro-batches": (["train", *QUICK, "micro_batch_size=4"], None),
    "muon": (["train", *QUICK, *MUON], None),
    "alignment": (
        ["train", *QUICK, "alignment=efficientnet_lite0", "alignment.width=16"],
        "alignment.projector.0.weight",
    ),
    "mean_flow": (["train", *QUICK, *FEW_CALLS["mean_flow"]], TARGET),
    "improved_mean_flow": (["train", *QUICK, *FEW_CALLS["improved_mean_flow"]], TARGET),
    "alpha_flow": (["train", *QUICK, *FEW_CALLS["alpha_flow"]], TARGET),
    "lagrangian": (["train", *QUICK, *FEW_CALLS["lagrangian"]], TARGET),
    "scm": (["train", *QUICK, *FEW_CALLS["scm"]], "objective.loss.uncertainty.weight"),
    "gan": (["train", *PLAIN, *FAMILIES["gan"], *ALONE], None),
    "codes": (["train", *PLAIN, *FAMILIES["autoregressive"], *ALONE], None),
    "adversary": (
        [*AUTOENCODER, *ADVERSARIAL, "reconstruction.discriminator.start=1"],
        "loss.discriminator.layers.0.weight",
    ),
    "vq": ([*AUTOENCODER, "autoencoder=vq", "autoencoder.codes=8"], None),
    "learned": (["train", *QUICK, *LEARNED], HISTORY),
    "variance": (["train", *QUICK, "objective=improved_ddpm", "schedule=ddpm_linear"], None),
    "shortcut": (["train", *QUICK, *FEW_CALLS["shortcut"]], TARGET),
    "ect": (["train", *QUICK, *FEW_CALLS["ect"]], None),
    "score matching": (["train", *PLANE], None),
    "edm2": (["train", *PLAIN, *ALONE, *EDM2, *ADAM], None),
}


@pytest.mark.long
@pytest.mark.parametrize("name", first_fast(STATES, 4))
def test_a_run_that_goes_on_from_its_middle_ends_as_the_whole(lab, tmp_path, name):
    arguments, learned = STATES[name]
    autoencoder = arguments[0] == "train-autoencoder"
    tiny_first_stage(tmp_path / "stage", "vq")
    kept = "callbacks.checkpoint.keep_every_n_steps=2"
    lab.done(*arguments, *FAST, kept, "run_dir=run")
    whole, parts = tmp_path / "run", killed_after_two_steps(tmp_path / "run")
    weights = "state_dict" if autoencoder else "current_model_state"
    state = checkpoint_of(whole)[weights]
    assert learned is None or state[learned].abs().sum() > 0
    made = parts / saving.FIRST_STAGE_FILE
    if autoencoder:
        made.unlink()
    assert not same(checkpoint_of(parts)[weights], state)
    lab.done(arguments[0], f"resume={parts.name}")
    require_equal_training(whole, parts)
    assert steps_of(parts) == [1, 2, 3, 4]
    if autoencoder:
        assert made.read_bytes() == (whole / saving.FIRST_STAGE_FILE).read_bytes()


@pytest.mark.long
def test_a_run_of_more_steps_goes_on_after_its_end(lab, tmp_path):
    common = [*QUICK, "lr_schedule=constant"]  # as a cosine's depends on the run's length
    for folder, steps in (("whole", 6), ("parts", 3)):
        lab.done("train", *common, f"run_dir={folder}", f"trainer.max_steps={steps}")
    lab.done("train", "resume=parts", "trainer.max_steps=6")
    require_equal_training(tmp_path / "whole", tmp_path / "parts")


EXACT = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
RANKED = ["alignment", "mean_flow", "shortcut", "ect", "gan", "codes", "edm2", "edm2 muon"]
RANKED += ["improved_mean_flow", "alpha_flow", "lagrangian", "scm"]
SHARDED = [name for name in RANKED if name != "gan"]  # which is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"), [*product(RANKED, ["ddp"]), *product(SHARDED, ["fsdp"])]
)
def test_two_ranks_train_the_model_of_one(lab, tmp_path, name, strategy):
    tiny_first_stage(tmp_path / "stage", "vq")
    arguments = [*STATES[name.split()[0]][0], *(MUON[:1] if "muon" in name else [])]
    exact = [*EXACT, *FAST, "micro_batch_size=2", "data.flip=false"]
    lab.done(*arguments, *exact, "run_dir=one")
    several = [*arguments, f"trainer={strategy}", *exact, "trainer.devices=2", "run_dir=two"]
    for ended in on_two_ranks({"x": several}, tmp_path):
        assert ended["x"].code == 0, ended["x"].err
    assert summary_of(tmp_path / "two")["ranks"] == 2
    losses = [curve(tmp_path / run, "train/loss") for run in ("one", "two")]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (checkpoint_of(tmp_path / run)["current_model_state"] for run in ("one", "two"))
    # alpha-Flow divides errors, and so their rounding, by alpha
    atol = 1e-3 if name.split()[0] in ("edm2", "alpha_flow") else 1e-4
    torch.testing.assert_close(two, one, rtol=1e-3, atol=atol)


BATCH = ["batch_size=16", "micro_batch_size=2", "trainer.max_steps=5", "validate_every_n_steps=3"]
PARTS = [*TINY, *BATCH, "backbone.depth=2", "name=x", "callbacks.weight_averaging.also=[40]"]
PARTS.append("callbacks.posthoc_ema.snapshots=2")
LAYOUT = [*PARTS, "callbacks.evaluation=null", "callbacks.sample_grid=null"]


def weights(folder) -> dict[str, torch.Tensor]:
    checkpoint = checkpoint_of(folder)
    tensors = {f"averaged.{name}": value for name, value in checkpoint["state_dict"].items()}
    tensors |= {f"40.{name}": value for name, value in checkpoint["averages"]["40"].items()}
    tensors |= checkpoint["current_model_state"] | checkpoint["snapshot"]
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    return tensors


def assert_alike(one, other) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("ddp", []),
        ("fsdp", []),
        ("ddp", MUON[:2]),
        ("fsdp", MUON[:2]),
        ("fsdp", ["optimizer.weight_decay=0.1", "parameter_groups=[{pattern:'*bias',lr:1e-4}]"]),
    ],
)
def test_the_loss_curve_does_not_depend_on_the_layout(lab, tmp_path, strategy, optimizer):
    lab.done("train", *LAYOUT, *EXACT, *optimizer, "run_dir=1x8")
    for ranks, accumulated in ((2, 4), (4, 2)):
        name = f"{ranks}x{accumulated}"
        layout = [f"trainer={strategy}", *EXACT, f"trainer.devices={ranks}", f"run_dir={name}"]
        lab.done("train", *LAYOUT, *optimizer, *layout)
        summary = summary_of(tmp_path / name)
        assert (summary["ranks"], summary["images_seen"]) == (ranks, 5 * 16)
        for metric in ("train/loss", "val/loss"):
            expected = curve(tmp_path / "1x8", metric)
            assert len(expected) >= 2
            assert curve(tmp_path / name, metric) == pytest.approx(expected, rel=1e-5), metric
        assert_alike(tmp_path / "1x8", tmp_path / name)
        first, second = (snapshot_paths(tmp_path / run) for run in ("1x8", name))
        assert list(first) == list(second) == [3, 5]
        for step, path in first.items():
            snapshot, other = (read(each, "") for each in (path, second[step]))
            torch.testing.assert_close(other, snapshot, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_fsdp_samples_and_measures_with_averaged_weights_as_one_process_does(lab, tmp_path):
    run = ["run_dir=two", "callbacks.evaluation.batch_size=3", "callbacks.sample_grid.columns=3"]
    # ranks draw unequal numbers of sample batches, also during training
    often = ["callbacks.evaluation.every_n_steps=2", "metrics.num_samples=17"]
    learned = ["objective/loss/uncertainty=learned"]
    lab.done("train", *PARTS, *run, *often, *learned, "trainer=fsdp", *EXACT, "trainer.devices=2")
    summary = summary_of(tmp_path / "two")
    exact = ["precision=32-true", "device=cpu"]
    for name, value in lab.result("evaluate", "run=two", *exact).items():
        assert value == pytest.approx(summary["metrics"][name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "shards"), [("adamw", "false"), ("muon", "false"), ("adamw", "true")]
)
def test_a_sharded_run_is_resumed_by_one_process_and_back(lab, tmp_path, optimizer, shards):
    common = [*LAYOUT, f"optimizer={optimizer}"]
    lab.done("train", *common, *EXACT, "run_dir=whole", "trainer.max_steps=6")
    common += [f"callbacks.checkpoint.{key}={shards}" for key in ("sharded", "background")]
    fsdp = "trainer.strategy={_target_:diffusion_lab.compute.sharding.FSDP}"
    start = [*common, "trainer=fsdp", *EXACT, "trainer.devices=2", "run_dir=parts"]
    lab.done("train", *start, "trainer.max_steps=2")
    alone = ["trainer.strategy=auto", "trainer.devices=1"]
    for steps, where in ((4, alone), (6, [fsdp, "trainer.devices=2"])):
        lab.done("train", "resume=parts", f"trainer.max_steps={steps}", *where)
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (curve(tmp_path / run, "train/loss") for run in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_and_activation_checkpointing_go_with_several_processes(lab, tmp_path, strategy):
    several = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    options = ["trainer.precision=bf16-mixed", "activation_checkpointing=true"]
    if strategy == "fsdp":
        options.append("trainer.strategy.gather_bf16=true")
    lab.done("train", *LAYOUT, *several, *options, "run_dir=two")
    lab.done("train", *LAYOUT, *EXACT, "run_dir=one")
    expected = curve(tmp_path / "one", "train/loss")
    assert curve(tmp_path / "two", "train/loss") == pytest.approx(expected, rel=0.02)
