"""Checkpoints in shards hold what whole ones do, and are kept, dropped and found damaged."""

import errno
import os
from pathlib import Path
from time import sleep

import torch
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY
from torch.utils._pytree import tree_leaves

from diffusion_lab.runs import checkpoints, weights

RUN = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
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


def test_a_run_with_shards_is_resumed_sampled_and_exported_as_another(lab, monkeypatch):
    def slow(checkpoint: dict, path: Path) -> None:
        sleep(0.2)  # later steps have changed the weights by then
        save(checkpoint, path)

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", slow)
    steps = ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=2"]
    for name, more in RUNS.items():
        lab.done("train", *RUN, *steps, *more, "trainer.max_steps=5", f"run_dir={name}")
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
    err = lab.done("train", *RUN, BEHIND, *steps)
    assert_names(err, "step 2", os.strerror(errno.ENOSPC))
    assert [path.name for path in Path("run/checkpoints").glob("step_*")] == ["step_0000004.ckpt"]


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
