"""Training puts weights back to unit magnitude: after each step, and not where none is taken."""

import pytest
import torch
from helpers.faults import nan, spoil_loss
from helpers.tiny_runs import EDM2, QUICK, checkpoint_of, same
from safetensors.torch import load_file, save_file

RUN = [*(each for each in QUICK if "backbone" not in each), *EDM2, "name=x"]
RECIPE = ["optimizer=adam", "optimizer.lr=0.1", "optimizer.betas=[0.9,0.99]"]
RECIPE += ["lr_schedule=inverse_sqrt", "lr_schedule.warmup_images=0"]
RECIPE += ["objective/loss/uncertainty=learned", "callbacks.posthoc_ema.snapshots=2"]
RECIPE += ["batch_size=8", "micro_batch_size=4"]


def magnitudes(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The magnitudes of the weights of all outputs of all layers of a run's network."""
    found = []
    for name, weight in weights.items():
        if "embeddings" in name:
            found += [weight[:-1].square().mean(0).sqrt(), weight[-1:].square().mean(1).sqrt()]
        elif name.startswith("denoiser.backbone") and weight.ndim > 1:
            found.append(weight.flatten(1).square().mean(1).sqrt())
    assert len(found) > 20
    return torch.cat(found)


@pytest.mark.slow
def test_weights_have_unit_magnitude_after_steps(lab, tmp_path):
    lab.done("train", *RUN, *RECIPE, "run_dir=whole", "trainer.max_steps=6")
    whole = checkpoint_of(tmp_path / "whole")
    trained = magnitudes(whole["current_model_state"])
    torch.testing.assert_close(trained, torch.ones_like(trained), rtol=1e-3, atol=0)
    gains = [v for name, v in whole["current_model_state"].items() if name.endswith(".gain")]
    assert all(gain.abs() > 1e-4 for gain in gains)


@pytest.mark.long
def test_a_skipped_step_leaves_the_weights_bit_for_bit(lab, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, [3], nan)
    few = ["callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=3"]
    lab.done("train", *RUN, *RECIPE, *few, "run_dir=run")
    after, before = (checkpoint_of(tmp_path / "run", name) for name in ("last", "previous"))
    assert (before["global_step"], after["global_step"]) == (2, 3)
    assert same(before["current_model_state"], after["current_model_state"])


@pytest.mark.slow
def test_initial_weights_are_given_unit_magnitude_before_the_first_step(lab, tmp_path):
    lab.done("train", *RUN, "run_dir=first", "trainer.max_steps=1")
    lab.done("export", "run=first", "output=net")
    tensors = load_file(tmp_path / "net/model.safetensors")
    grown = {name: 3 * v if v.ndim > 1 else v for name, v in tensors.items()}
    save_file(grown, tmp_path / "grown.safetensors")
    start = ["init_from=grown.safetensors", "optimizer.lr=1e-30", "run_dir=second"]
    lab.done("train", *RUN, *start, "trainer.max_steps=1")
    for name, value in checkpoint_of(tmp_path / "second")["current_model_state"].items():
        expected = tensors.get(name.removeprefix("denoiser."))
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
