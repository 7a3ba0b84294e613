"""Runs trained by score matching without the noise, and of energies."""

import pytest
from helpers.faults import Killed, at_step, die
from helpers.pairs import first_fast
from helpers.tiny_runs import TINY, require_equal_training, rows

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
def test_a_run_is_resumed_bit_for_bit_and_opened(lab, tmp_path, parts):
    parts = [*parts, "lr_schedule=constant"]  # which does not depend on the number of steps
    for folder, steps in (("whole", 4), ("parts", 2)):
        code, _, err = lab("train", *parts, f"run_dir={folder}", f"trainer.max_steps={steps}")
        assert code == 0, err
    code, _, err = lab("train", "resume=parts", "trainer.max_steps=4")
    assert code == 0, err
    require_equal_training(tmp_path / "whole", tmp_path / "parts")
    code, _, err = lab("sample", "run=whole", "num_samples=3", "sampler.steps=2", "output=points")
    assert code == 0, err
    _, model = runs.load(tmp_path / "whole")
    assert isinstance(model.loss, ScoreMatching)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(lab, tmp_path, monkeypatch):
    common = [*PLANE, "trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=1"]
    code, _, err = lab("train", *common, "run_dir=whole")
    assert code == 0, err
    with monkeypatch.context() as patch:
        at_step(patch, 3, die)
        with pytest.raises(Killed):
            lab("train", *common, "run_dir=parts")
    code, _, err = lab("train", "resume=parts")
    assert code == 0, err
    require_equal_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_training_learns_the_score_that_denoising_learns(lab, tmp_path):
    learning = ["optimizer.lr=5e-3", "lr_schedule.warmup_images=0", "trainer.max_steps=60"]
    learning += ["schedule.sigma_min=0.3", "batch_size=256", "callbacks.weight_averaging=null"]
    last = {}
    for loss in ("denoising", "sliced_score_matching", "exact_score_matching"):
        chosen = [f"objective/loss={loss}", f"run_dir={loss}"]
        code, _, err = lab("train", *PLANE, *learning, *chosen)
        assert code == 0, err
        losses = [row["test/loss"] for row in rows(tmp_path / loss) if "test/loss" in row]
        last[loss] = losses[-1]
    assert last["denoising"] < 0.75  # 1 without training; 0.49 for the exact score
    assert last["exact_score_matching"] == pytest.approx(last["denoising"], abs=0.06)
    assert last["sliced_score_matching"] == pytest.approx(last["denoising"], abs=0.08)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_images_are_trained_by_sliced_score_matching(lab, tmp_path, precision):
    code, _, err = lab(
        "train", *IMAGES, "objective/loss=sliced_score_matching", f"trainer.precision={precision}"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective/loss=exact_score_matching", "denoiser.clip=1"], "denoiser.clip=1"),
        (
            ["objective/loss=exact_score_matching"],
            "objective/loss=sliced_score_matching",
        ),  # 128 numbers
        (
            ["objective/loss=sliced_score_matching", "objective/loss/uncertainty=learned"],
            "objective/loss/uncertainty",
        ),
        (["objective/loss=sliced_score_matching", "coupling=optimal_transport"], "coupling=none"),
        (
            ["objective/loss=sliced_score_matching", "objective.offset_noise=0.1"],
            "objective.offset_noise=0",
        ),
        (
            ["objective/loss=sliced_score_matching", "objective/time_sampler=uniform"],
            "weighting=snr",
        ),
        (
            ["objective/loss=sliced_score_matching", *ZERO_SNR, "objective=v_prediction"],
            "objective/loss/weighting=snr",
        ),
        (["objective/loss=sliced_score_matching", "activation_checkpointing=true"], "=false"),
        (["objective/loss=sliced_score_matching", "compile=true"], "compile=auto"),
        (["objective/loss=sliced_score_matching", "objective.loss.projections=0"], "projections=0"),
        (
            ["objective/loss=sliced_score_matching", "alignment=efficientnet_lite0"],
            "alignment=none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(refusal, tmp_path, overrides, said):
    images = ["data.pad=16"] if "objective/loss=exact_score_matching" in overrides else []
    assert said in refusal("train", *IMAGES, *images, *overrides, "run_dir=run")
    assert not (tmp_path / "run").exists()


OF_ENERGIES = [each for each in IMAGES if not each.startswith("backbone")] + ["backbone=energy"]


def test_an_energy_has_no_second_channel_or_layers_to_run_again(refusal):
    settings = ("denoiser.self_conditioning=true", "activation_checkpointing=true", "compile=true")
    for override in settings:
        sentence = refusal("train", *OF_ENERGIES, override)
        assert override.removeprefix("denoiser.").removesuffix("=true") in sentence


@pytest.mark.parametrize(
    "network", ["unet_small", pytest.param("dit", marks=pytest.mark.slow), "diffusers_unet", "edm2"]
)
def test_an_energy_of_images_is_trained_and_drawn_or_refused(lab, tmp_path, network):
    parts = [*OF_ENERGIES, f"backbone@backbone.network={network}", "run_dir=run"]
    parts += ["backbone.network.bandwidth=1"] if network == "edm2" else []
    code, _, err = lab("train", *parts)
    if network in ("diffusers_unet", "edm2"):
        assert code == 2
        assert ("differentiated twice" if network == "diffusers_unet" else "magnitudes") in err
        assert not (tmp_path / "run").exists()
        return
    assert code == 0, err
    code, _, err = lab("sample", "run=run", "num_samples=2", "sampler.steps=2", "output=drawn")
    assert code == 0, err
