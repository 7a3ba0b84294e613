"""Checkpoints in shards hold what whole ones do, and are kept, dropped and found damaged."""

from pathlib import Path

import torch
from helpers.tiny_runs import TINY, checkpoint_of
from torch.utils._pytree import tree_leaves

from diffusion_lab.runs import checkpoints, weights

RUN = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
SHARDED = "callbacks.checkpoint.sharded=true"


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


def test_a_run_with_shards_is_resumed_sampled_and_exported_as_another(lab):
    steps = ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=2"]
    for name, *more in (("whole",), ("parts", SHARDED)):
        lab.done("train", *RUN, *steps, *more, "trainer.max_steps=5", f"run_dir={name}")
        lab.done("train", f"resume={name}", "trainer.max_steps=7")
        lab.done("sample", f"run={name}", "num_samples=2", "save=npz", "device=cpu")
        lab.done("export", f"run={name}", f"output={name}_weights")
    whole, parts = (checkpoint_of(Path(name)) for name in ("whole", "parts"))
    for key in ("state_dict", "averages", "current_model_state", "optimizer_states", "global_step"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    first, second = (
        weights.read(Path(f"{name}_weights/model.safetensors"), "") for name in ("whole", "parts")
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    # milestones, the last and the one before it
    assert folders("parts") == ["2", "4", "6", "7"]
    small = Path("parts/checkpoints/last.ckpt").stat().st_size
    assert small < Path("whole/checkpoints/last.ckpt").stat().st_size / 2
    (part,) = Path("parts/checkpoints").glob("shards_0000007_*/*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert "has another size" in checkpoints.fault(Path("parts/checkpoints/last.ckpt"))
    assert checkpoints.newest_intact("parts").name == "previous.ckpt"


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
