"""Checkpoints of single steps: milestones, the best by a metric, and those in shards."""

import errno
import json
import math
import os
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import QUICK, checkpoint_of, curve, steps_of
from torch.utils._pytree import tree_leaves

from diffusion_lab.common.files import read_rows
from diffusion_lab.runs import checkpoints, weights
from diffusion_lab.training.callbacks import checkpoint

KEPT = "callbacks.checkpoint"
FAST = ["optimizer.lr=0.1", "lr_schedule.warmup_images=0", "callbacks.weight_averaging=null"]
EVERY = [*QUICK, *FAST, "run_dir=run", "trainer.max_steps=6", "validate_every_n_steps=1"]
BEST = [*EVERY, f"{KEPT}.every_n_steps=4", f"{KEPT}.best=val/loss", f"{KEPT}.top_k=2"]
BEST.append(f"{KEPT}.keep_every_n_steps=3")


def steps_in(folder):
    """The steps of the checkpoints that a run keeps, from what is inside their files."""
    paths = sorted((folder / checkpoints.FOLDER).glob(checkpoints.FILES))
    return [torch.load(path, weights_only=True)["global_step"] for path in paths]


def test_milestones_and_the_best_by_validation_loss_are_kept_beside_the_last_two(trained_once):
    run = trained_once("train", *BEST) / "run"
    losses = dict(zip(steps_of(run, "val/loss"), curve(run, "val/loss"), strict=True))
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert {*best} != {3, 6}, "the milestones"
    assert steps_in(run) == sorted({3, 6, *best})
    assert checkpoints.ranked(run, "val/loss") == {step: losses[step] for step in best}
    newest, before = (checkpoint_of(run, name) for name in ("last", "previous"))
    assert (newest["global_step"], before["global_step"]) == (6, 4)


@pytest.mark.long
def test_a_resumed_run_keeps_the_same(lab, trained_once, tmp_path, killed_at_step):
    whole = trained_once("train", *BEST) / "run"
    killed_at_step(5, "train", *BEST)
    lab.done("train", "resume=run")
    assert steps_in(tmp_path / "run") == steps_in(whole)
    assert checkpoints.ranked(tmp_path / "run") == checkpoints.ranked(whole)


def keep(folder, *steps):
    """Saves checkpoints of these steps, and keeps them."""
    for step in steps:
        checkpoints.save({"state_dict": {}, "global_step": step}, folder / checkpoints.LAST)
        checkpoints.keep(folder, step)


def test_a_step_that_is_best_no_longer_stays_if_it_is_a_milestone(tmp_path):
    keep(tmp_path, 2, 3, 4)
    checkpoints.rank(tmp_path, "val/loss", {2: 0.3, 3: 0.4}, lambda step: step == 2)
    checkpoints.rank(tmp_path, "val/loss", {4: 0.1}, lambda step: step == 2)
    assert steps_in(tmp_path) == [2, 4]


def test_a_milestone_stays_if_a_resumed_run_has_others(tmp_path):
    keep(tmp_path, 2, 4, 6)
    checkpoints.rank(tmp_path, "val/loss", {4: 0.2}, lambda step: step % 2 == 0)
    checkpoints.rank(tmp_path, "val/loss", {6: 0.1}, lambda step: step % 15 == 0)
    assert steps_in(tmp_path) == [2, 4, 6]


def test_one_takes_no_space_while_it_is_the_last_and_a_damaged_one_is_named(tmp_path):
    keep(tmp_path, 1, 2)
    assert checkpoints.file_of(tmp_path, 2).samefile(tmp_path / checkpoints.LAST)
    keep(tmp_path, 3)
    path = checkpoints.file_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with refused(path):
        checkpoints.chosen(tmp_path, 1)
    assert checkpoints.chosen(tmp_path, 2) == (2, checkpoints.file_of(tmp_path, 2))


def test_a_value_that_is_not_finite_is_never_the_best(lab, tmp_path, monkeypatch):
    measured = checkpoint.measured_now
    values = {1: math.nan, 2: 3.0, 3: math.inf, 4: 2.0, 5: math.nan, 6: -math.inf}

    def measured_now(trainer, name):
        known = measured(trainer, name) is not None
        return values[trainer.global_step] if known else None

    monkeypatch.setattr(checkpoint, "measured_now", measured_now)
    lab.done("train", *BEST)
    assert checkpoints.ranked(tmp_path / "run") == {4: 2.0, 2: 3.0}
    assert steps_in(tmp_path / "run") == [2, 3, 4, 6]


@pytest.mark.slow
def test_a_higher_accuracy_is_better(trained_once, monkeypatch):
    # FID of samples at steps 2, 4 and 6 ranks as the smallest, recall as the largest
    run = trained_once(
        "train",
        *(each for each in EVERY if each != "callbacks.evaluation=null"),
        "callbacks.evaluation.every_n_steps=2",
        "metrics.reference=validation",
        f"{KEPT}.best=recall",
        f"{KEPT}.top_k=3",
    ) / "run"  # fmt: skip
    rows = read_rows(run / "metrics.jsonl")
    values = [v for row in rows for k, v in row.items() if k.startswith("recall/")]
    found = list(checkpoints.ranked(run, "recall").values())
    assert found == sorted(values, reverse=True)[:3]


@pytest.mark.long
def test_commands_open_the_checkpoint_that_is_asked_for(lab, refusal, trained_once, tmp_path):
    run = trained_once("train", *BEST) / "run"
    best = next(iter(checkpoints.ranked(run)))
    images = {}
    assert checkpoints.chosen(run, 6) is None  # the newest
    assert checkpoints.chosen(run, "best") == checkpoints.chosen(run, best)
    for step in {"null", "3", "best"}:
        draw = [f"run={run}", "num_samples=2", f"output={tmp_path}/{step}"]
        images[step] = lab.drawn(*draw, f"step={step}")["images"]
    assert not np.array_equal(images["null"], images["3"])
    assert np.array_equal(images["best"], images["null"]) == (best == 6)
    lab.done("export", f"run={run}", "output=mine", "step=3")
    exported = lab.drawn("run=mine", *draw[1:])["images"]
    assert np.array_equal(exported, images["3"])
    assert_names(refusal("sample", f"run={run}", "step=4"), "step=4", "3", "6")
    assert_names(refusal("sample", "run=mine", "step=3"), "step=3", "mine")


@pytest.mark.slow
def test_an_evaluation_of_another_step_is_not_one_of_the_run(lab, refusal, trained_once):
    run = trained_once("train", *BEST) / "run"
    lab.done("evaluate", f"run={run}", "step=3", "device=cpu", "metrics.num_samples=8")
    (record,) = (run / "evaluations").glob("*.json")
    assert json.loads(record.read_text())["sampling"]["step"] == 3
    assert_names(refusal("evaluate", f"run={run}", f"against={run}"), str(run))


def test_best_is_refused_without_ranked_checkpoints(refusal, finished_run):
    assert_names(refusal("sample", f"run={finished_run}", "step=best"), "step=best")


SHARDED = "callbacks.checkpoint.sharded=true"
BEHIND = "callbacks.checkpoint.background=true"
RUNS = {"whole": [], "parts": [SHARDED], "behind": [BEHIND], "parts_behind": [SHARDED, BEHIND]}
STATE = ("state_dict", "averages", "current_model_state", "optimizer_states", "global_step")


def folders(run: str) -> list[str]:
    """The steps of the folders of tensors that a run keeps."""
    return [path.name.split("_")[1].lstrip("0") for path in sorted(Path(run).glob("*/shards_*"))]


def test_a_tree_is_taken_apart_and_put_together():
    shared = torch.arange(3)
    tree = {"a": [shared, {"b": shared}], "step": 3, "words": "tensors"}
    words, tensors = checkpoints.take_apart(tree)
    assert len(tensors) == 1
    assert not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(words))
    again = checkpoints.put_together(words, tensors)
    assert again["a"][1]["b"] is again["a"][0] is shared
    assert (again["step"], again["words"]) == (3, "tensors")


@pytest.mark.long
def test_a_run_with_shards_is_resumed_sampled_and_exported_as_another(lab, monkeypatch):
    def slow(checkpoint: dict, path: Path) -> None:
        sleep(0.2)  # later steps have changed the weights by then
        save(checkpoint, path)

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", slow)
    steps = ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=2"]
    for name, more in RUNS.items():
        lab.done("train", *QUICK, *steps, *more, "trainer.max_steps=5", f"run_dir={name}")
        lab.done("train", f"resume={name}", "trainer.max_steps=7")
        lab.done("sample", f"run={name}", "num_samples=2", "save=npz", "device=cpu")
        lab.done("export", f"run={name}", f"output={name}_weights")
    for file in ("last.ckpt", "step_0000002.ckpt", "step_0000004.ckpt"):
        whole, *others = (checkpoints.read(Path(name) / "checkpoints" / file) for name in RUNS)
        for key in STATE:
            for other in others:
                torch.testing.assert_close(other[key], whole[key], rtol=0, atol=0)
    whole, *others = (weights.read(Path(f"{name}_weights/model.safetensors"), "") for name in RUNS)
    for other in others:
        torch.testing.assert_close(other, whole, rtol=0, atol=0)
    sizes = [Path(f"{name}/checkpoints/last.ckpt").stat().st_size for name in ("whole", "behind")]
    assert sizes[1] < 1.01 * sizes[0]  # what shares memory is written once
    # milestones, the last and the one before it
    assert folders("parts") == ["2", "4", "6", "7"]
    small = Path("parts/checkpoints/last.ckpt").stat().st_size
    assert small < Path("whole/checkpoints/last.ckpt").stat().st_size / 2
    (part,) = Path("parts/checkpoints").glob("shards_0000007_*/*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert "has another size" in checkpoints.fault(Path("parts/checkpoints/last.ckpt"))
    assert checkpoints.newest_intact("parts").name == "previous.ckpt"


def test_training_goes_on_where_a_thread_cannot_write(lab, monkeypatch):
    def failing(checkpoint: dict, path: Path) -> None:
        if checkpoint["global_step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, path)

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", failing)
    steps = ["callbacks.checkpoint.keep_every_n_steps=2", "trainer.max_steps=5", "run_dir=run"]
    err = lab.done("train", *QUICK, BEHIND, *steps)
    assert_names(err, "step 2", os.strerror(errno.ENOSPC))
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_0000004.ckpt"]


@pytest.mark.long
def test_a_run_that_fails_waits_for_the_thread(lab, monkeypatch):
    def slow(checkpoint: dict, path: Path) -> None:
        sleep(1)
        save(checkpoint, path)

    def fail(self, trainer, *_) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("a fault")

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr("diffusion_lab.training.callbacks.Throughput.on_train_batch_end", fail)
    steps = ["callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=5", "run_dir=run"]
    with pytest.raises(RuntimeError, match="a fault"):
        lab("train", *QUICK, BEHIND, *steps)
    assert checkpoints.step_of("run") == 2


def test_no_folder_is_removed_while_a_checkpoint_cannot_be_read(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("shards_0000001_0", "shards_0000002_0"):
        (folder / name).mkdir(parents=True)
    torch.save({"shards": {"folder": "shards_0000002_0"}}, folder / "last.ckpt")
    (folder / "previous.ckpt").write_bytes(b"damaged")
    checkpoints.drop_shards(tmp_path)
    assert len(folders(str(tmp_path))) == 2
    (folder / "previous.ckpt").rename(folder / "damaged.ckpt")
    checkpoints.drop_shards(tmp_path)
    assert folders(str(tmp_path)) == ["2"]
