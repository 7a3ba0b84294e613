"""The learned state of an objective is trained with a run, and saved and resumed exactly."""

import pytest
import torch
from helpers.tiny_runs import TINY

from diffusion_lab import runs

LEARNING = [
    "objective/time_sampler=second_moment",
    "objective.time_sampler.bins=2",
    "objective.time_sampler.history=2",
    "objective/loss/uncertainty=learned",
    "objective.loss.uncertainty.channels=8",
    "denoiser.self_conditioning=true",
    "callbacks.evaluation=null",
    "callbacks.sample_grid=null",
    "logger=none",
    "micro_batch_size=4",
]
HISTORY, COUNT = "objective.time_sampler.history", "objective.time_sampler.count"


def checkpoint_of(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_resuming_restores_the_history_and_the_uncertainty_exactly(lab, tmp_path):
    common = [*TINY, *LEARNING]
    for folder, steps in (("whole", 5), ("parts", 3)):
        code, _, err = lab("train", *common, f"run_dir={folder}", f"trainer.max_steps={steps}")
        assert code == 0, err
    half = checkpoint_of(tmp_path / "parts")
    code, _, err = lab("train", "resume=parts", "trainer.max_steps=5")
    assert code == 0, err
    whole, parts = (checkpoint_of(tmp_path / folder) for folder in ("whole", "parts"))
    for part in ("state_dict", "current_model_state"):
        assert {HISTORY, COUNT, "objective.loss.uncertainty.weight"} <= set(whole[part])
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name
    assert half["current_model_state"][COUNT].sum() == 3 * 8
    assert whole["current_model_state"][COUNT].sum() == 5 * 8
    assert (whole["current_model_state"][HISTORY] > 0).all()
    assert whole["current_model_state"]["objective.loss.uncertainty.weight"].abs().sum() > 0
    _, model = runs.load(tmp_path / "parts")  # sampling needs the denoiser alone
    assert model.denoiser.self_conditioning


def test_a_learned_variance_trains_from_the_command_line(lab, tmp_path):
    code, _, err = lab(
        "train",
        *TINY,
        "objective=improved_ddpm",
        "schedule=ddpm_linear",
        "callbacks.evaluation=null",
        "callbacks.sample_grid=null",
        "logger=none",
        "trainer.max_steps=2",
        "run_dir=run",
    )
    assert code == 0, err
    _, model = runs.load(tmp_path / "run")
    assert model.denoiser.learned_variance
    assert not [
        name for name in checkpoint_of(tmp_path / "run")["state_dict"] if "objective" in name
    ]


@pytest.mark.parametrize("schedule", ["cosine", "rectified"])
def test_a_learned_variance_without_a_table_is_refused(refusal, schedule):
    settings = ["objective=v_prediction", "objective/loss/variance=hybrid", f"schedule={schedule}"]
    assert "objective/loss/variance=none" in refusal("train", *TINY, *settings)
