"""Runs trained by score matching without the noise, and of energies."""

import pytest
from helpers.pairs import first_fast
from helpers.tiny_runs import TINY, rows

from diffusion_lab import runs
from diffusion_lab.diffusion.objective.loss import ScoreMatching

PLANE = ["experiment=toy/score_matching", "logger=none", "trainer.accelerator=cpu"]
PLANE += ["backbone.width=16", "callbacks.sample_grid=null", "batch_size=32"]
IMAGES = [*TINY, "logger=none", "callbacks.evaluation=null", "callbacks.sample_grid=null"]
ENERGY = [each for each in PLANE if not each.startswith("backbone")]
ENERGY += ["backbone=energy", "backbone.network.width=16"]
EXACT = "objective/loss=exact_score_matching"
ZERO_SNR = ["schedule=zero_terminal_snr", "denoiser.clip=null"]


@pytest.mark.parametrize(
    "parts",
    first_fast([PLANE, [*ENERGY, EXACT], [*PLANE, EXACT]]),
    ids=["sliced", "energy", "exact"],
)
def test_a_run_is_opened(lab, tmp_path, parts):
    lab.done("train", *parts, "run_dir=whole", "trainer.max_steps=2")
    lab.done("sample", "run=whole", "num_samples=3", "sampler.steps=2", "output=points")
    _, model = runs.load(tmp_path / "whole")
    assert isinstance(model.loss, ScoreMatching)


@pytest.mark.slow
def test_training_learns_the_score_that_denoising_learns(lab, tmp_path):
    learning = ["optimizer.lr=5e-3", "lr_schedule.warmup_images=0", "trainer.max_steps=60"]
    learning += ["schedule.sigma_min=0.3", "batch_size=256", "callbacks.weight_averaging=null"]
    last = {}
    for loss in ("denoising", "sliced_score_matching", "exact_score_matching"):
        chosen = [f"objective/loss={loss}", f"run_dir={loss}"]
        lab.done("train", *PLANE, *learning, *chosen)
        losses = [row["test/loss"] for row in rows(tmp_path / loss) if "test/loss" in row]
        last[loss] = losses[-1]
    assert last["denoising"] < 0.75  # 1 without training; 0.49 for the exact score
    assert last["exact_score_matching"] == pytest.approx(last["denoising"], abs=0.06)
    assert last["sliced_score_matching"] == pytest.approx(last["denoising"], abs=0.08)


@pytest.mark.parametrize("precision", first_fast(["bf16-mixed", "32-true"]))
def test_images_are_trained_by_sliced_score_matching(lab, tmp_path, precision):
    lab.done(
        "train", *IMAGES, "objective/loss=sliced_score_matching", f"trainer.precision={precision}"
    )


OF_ENERGIES = [each for each in IMAGES if not each.startswith("backbone")] + ["backbone=energy"]


@pytest.mark.parametrize("network", first_fast(["unet_small", "dit"]))
def test_an_energy_of_images_is_trained_and_drawn(lab, tmp_path, network):
    lab.done("train", *OF_ENERGIES, f"backbone@backbone.network={network}", "run_dir=run")
    lab.done("sample", "run=run", "num_samples=2", "sampler.steps=2", "output=drawn")
