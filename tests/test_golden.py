"""Twenty steps on FashionMNIST give the losses, samples and FID that were stored.

The stored values are from one processor and one version of torch; others round differently, and
twenty optimiser steps amplify the differences, so the tolerance is wider there.
"""

import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from helpers.pairs import first_fast

from diffusion_lab.data import DataError
from diffusion_lab.data.source import FashionMNIST

ROOT = Path(os.environ.get("DIFFUSION_LAB_DATA") or Path(__file__).parent.parent / "data")
STORED = Path(__file__).parent / "golden" / "training.json"
SHARED = [
    f"data.source.root={ROOT}",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=20",
    "trainer.log_every_n_steps=1",
    "batch_size=16",
    "data.validation_size=20",
    "validate_every_n_steps=20",
    "metrics.reference_size=200",
    "metrics.num_samples=64",
    "metrics.cache_dir=reference",
    "sampler.steps=4",
    "logger=none",
]
UNET = ["backbone=unet_small", "backbone.channels=16", "guidance=classifier_free"]
DIT = ["backbone=dit", "backbone.width=64", "backbone.heads=2", "backbone.depth=2"]
FEW = "data.fraction=0.02"  # the latents of each image are measured: 10 s for all data
AUTOENCODER = [
    *(value for value in SHARED if not value.startswith("sampler.")),
    "experiment=fashion_mnist/kl",
    FEW,
    "autoencoder.channels=8",
    "autoencoder.blocks=1",
    "callbacks.sample_grid.every_n_steps=null",
    "run_dir=first",
]
COMPOSITIONS = {
    "dit": [*DIT, "schedule=cosine", "objective=v_prediction", "sampler=heun"],
    "unet": UNET,
    "latent": [*DIT, FEW, "backbone.patch=2", "first_stage=kl", "first_stage.run=first"],
}


def same_machine(stored: dict) -> bool:
    return (stored["torch"], stored["cpu"]) == (torch.__version__, cpu())


def cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def measured(lab, name: str, folder: Path) -> dict[str, object]:
    """Trains a composition; returns losses, FID, and mean and standard deviation of pixels."""
    lab.done("train", *COMPOSITIONS[name], *SHARED, f"run_dir={folder}")
    lab.done("sample", f"run={folder}", "num_samples=16", "output=drawn", "save=npz")
    pixels = numpy.load("drawn.npz")["images"].astype(float)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    fids = [value for key, value in metrics.items() if key.startswith("fid/")]
    return {"losses": losses(folder), "pixels": [pixels.mean(), pixels.std()], "fid": fids}


@pytest.mark.parametrize("name", first_fast(COMPOSITIONS))
def test_losses_samples_and_fid_are_the_stored_ones(name, lab, tmp_path):
    try:
        FashionMNIST(root=str(ROOT)).prepare()
    except DataError as error:
        pytest.skip(f"FashionMNIST is not here and cannot be fetched: {error}")
    if name == "latent":
        lab.done("train-autoencoder", *AUTOENCODER)
    found = measured(lab, name, tmp_path / "run")
    assert len(found["losses"]) == 20
    if os.environ.get("STORE_GOLDEN"):
        stored = json.loads(STORED.read_text()) if STORED.exists() else {}
        stored |= {"torch": torch.__version__, "cpu": cpu(), name: found}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    stored = json.loads(STORED.read_text())
    tolerance = 1e-6 if same_machine(stored) else 0.05
    for key, values in stored[name].items():
        assert found[key] == pytest.approx(values, rel=tolerance), key
