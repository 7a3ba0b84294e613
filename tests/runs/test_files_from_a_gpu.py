"""Files that were written on a GPU, whose tensors name cuda:0, are opened where there is none."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from helpers.commands import run_alone
from helpers.tiny_runs import ALONE, TINY

MEASURED = ["metrics.num_samples=20", "metrics.reference_size=20"]
COMMANDS = {
    "resume": ["train", "resume=run", "trainer.max_steps=5"],
    "start": ["train", *TINY, *ALONE, "init_from=run", "run_dir=new", "trainer.max_steps=2"],
    "sample": ["sample", "run=run", "num_samples=2"],
    "sample-step": ["sample", "run=run", "num_samples=2", "step=4"],
    "average": ["average", "run=run"],
    "evaluate": ["evaluate", "run=run", *MEASURED],
    "sample-sweep": ["sample-sweep", "run=run", "steps=2", *MEASURED],
    "memorization": ["memorization", "run=run", "num_samples=4"],
    "likelihood": ["likelihood", "run=run", "num_images=4"],
    "encode": ["encode", "run=run"],
    "inpaint": ["inpaint", "run=run"],
    "profile": ["profile", "run=run"],
    "export": ["export", "run=run", "output=shared"],
}


@pytest.fixture(scope="module")
def from_gpu(tmp_path_factory) -> Path:
    """The folder of a run with files as a GPU writes them."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run_alone(
            folder,
            *("train", *TINY, *ALONE, "trainer.max_steps=4", "run_dir=run"),
            *("callbacks.posthoc_ema.snapshots=2", "callbacks.checkpoint.keep_every_n_steps=4"),
        )
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return folder


SLOW = ("memorization", "profile")
CASES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS]


@pytest.mark.parametrize("name", CASES)
def test_every_command_opens_them(lab, from_gpu, tmp_path, name):
    copytree(from_gpu, tmp_path, dirs_exist_ok=True)
    lab.done(*COMMANDS[name])
