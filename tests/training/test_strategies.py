"""Any layout of a batch, DDP or FSDP, trains the same model; checkpoints of FSDP are whole."""

import pytest
import torch
from helpers.tiny_runs import TINY, checkpoint_of, rows, summary_of

from diffusion_lab.runs.weights import read, snapshot_paths

EXACT = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
BATCH = ["batch_size=16", "micro_batch_size=2", "trainer.max_steps=5", "validate_every_n_steps=3"]
PARTS = [*TINY, *BATCH, "backbone.depth=2", "name=x", "callbacks.weight_averaging.also=[40]"]
PARTS.append("callbacks.posthoc_ema.snapshots=2")
PLAIN = [*PARTS, "callbacks.evaluation=null", "callbacks.sample_grid=null"]


def curve(folder, name: str) -> list[float]:
    return [row[name] for row in rows(folder) if name in row]


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
        ("ddp", ["optimizer=muon", "optimizer.weight_decay=0.1"]),
        ("fsdp", ["optimizer=muon", "optimizer.weight_decay=0.1"]),
        ("fsdp", ["optimizer.weight_decay=0.1", "parameter_groups=[{pattern:'*bias',lr:1e-4}]"]),
    ],
)
def test_the_loss_curve_does_not_depend_on_the_layout(lab, tmp_path, strategy, optimizer):
    lab.done("train", *PLAIN, *EXACT, *optimizer, "run_dir=1x8")
    for ranks, accumulated in ((2, 4), (4, 2)):
        name = f"{ranks}x{accumulated}"
        layout = [f"trainer={strategy}", *EXACT, f"trainer.devices={ranks}", f"run_dir={name}"]
        lab.done("train", *PLAIN, *optimizer, *layout)
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
    common = [*PLAIN, f"optimizer={optimizer}"]
    lab.done("train", *common, *EXACT, "run_dir=whole", "trainer.max_steps=6")
    common += [f"callbacks.checkpoint.{key}={shards}" for key in ("sharded", "background")]
    sharded = [
        "trainer.strategy={_target_:diffusion_lab.compute.sharding.FSDP}",
        "trainer.devices=2",
    ]
    start = [*common, "trainer=fsdp", *EXACT, "trainer.devices=2", "run_dir=parts"]
    lab.done("train", *start, "trainer.max_steps=2")
    alone = ["trainer.strategy=auto", "trainer.devices=1"]
    for steps, where in ((4, alone), (6, sharded)):
        lab.done("train", "resume=parts", f"trainer.max_steps={steps}", *where)
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "parts", "train/loss") == pytest.approx(
        curve(tmp_path / "whole", "train/loss"), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_and_activation_checkpointing_go_with_several_processes(lab, tmp_path, strategy):
    several = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    options = ["trainer.precision=bf16-mixed", "activation_checkpointing=true"]
    if strategy == "fsdp":
        options.append("trainer.strategy.gather_bf16=true")
    lab.done("train", *PLAIN, *several, *options, "run_dir=two")
    lab.done("train", *PLAIN, *EXACT, "run_dir=one")
    expected = curve(tmp_path / "one", "train/loss")
    assert curve(tmp_path / "two", "train/loss") == pytest.approx(expected, rel=0.02)
