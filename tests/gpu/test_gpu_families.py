"""The other families, energies and models of few steps on a GPU: trained, resumed and drawn."""

import math
from pathlib import Path

import pytest
import torch
from helpers.gpu import TRAINER
from helpers.logged import by_step
from helpers.tiny_runs import FAMILIES, TINY, tiny_first_stage

pytestmark = pytest.mark.gpu
DATA = ["data.source._target_=helpers.tiny_data.TinyData", "data.validation_size=20"]
KINDS = {
    **{name: [*DATA, *overrides] for name, overrides in FAMILIES.items()},
    "energy": [*DATA, "backbone=energy", "backbone@backbone.network=unet_small"],
    "sliced": [*TINY, "objective/loss=sliced_score_matching"],
    "mean_flow": [*TINY, "objective=mean_flow", "objective.loss.guidance=1.5"],
    "shortcut": [*TINY, "objective=shortcut"],
    "ect": [*TINY, "objective=ect", "schedule=edm", "objective.loss.stage_images=16"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_bf16_is_resumed_and_drawn(lab, tmp_path, kind):
    tiny_first_stage(tmp_path / "stage", "vq")
    common = [*KINDS[kind], "+debug=fast", TRAINER, "trainer.precision=bf16-mixed"]
    common += ["logger=none", "callbacks.evaluation=null", "callbacks.sample_grid=null"]
    common = list(dict.fromkeys(common))  # some kinds name +debug=fast, too
    lab.done("train", *common, "trainer.max_steps=3", "run_dir=run")
    lab.done("train", "resume=run", "trainer.max_steps=5")
    losses = [row["train/loss"] for row in by_step(Path("run")).values() if "train/loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))
    kept = torch.load("run/checkpoints/last.ckpt", weights_only=True, map_location="cpu")
    assert kept["global_step"] == 5
    lab.done("sample", "run=run", "num_samples=4", "output=drawn")
    assert Path("drawn.png").is_file()
