"""Several averages of the weights in one run: each as in a run of its own, resumed and chosen."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, checkpoint_of, same

from diffusion_lab.training.callbacks.weight_averaging import WeightAverage

RUN = [
    *QUICK,
    "optimizer.lr=0.1",
    "lr_schedule.warmup_images=0",
    "trainer.max_steps=6",
    "callbacks.checkpoint.every_n_steps=2",
]
RUN += ["callbacks.weight_averaging.ramp=null", "run_dir=run"]
HALF_LIFE = "callbacks.weight_averaging.half_life_images="
TWO = [*RUN, f"{HALF_LIFE}20", "callbacks.weight_averaging.also=[80]"]


@pytest.mark.parametrize("weight", [0.01, 0.7])
def test_an_average_moves_as_far_as_it_is_told_unless_the_step_is_bad(weight):
    module = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    begin = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    average = WeightAverage(module, begin)
    average.update(weight, torch.tensor(1.0))
    assert same(average.to_save(), begin)
    average.update(weight, torch.tensor(0.0))
    for name, p in module.named_parameters():
        torch.testing.assert_close(average.to_save()[name], begin[name].lerp(p, weight))


def denoiser(state):
    return {k.removeprefix("denoiser."): v for k, v in state.items() if k.startswith("denoiser.")}


@pytest.mark.slow
def test_two_averages_are_those_of_two_runs(trained_once):
    both = checkpoint_of(trained_once("train", *TWO) / "run")
    short, long = (
        checkpoint_of(trained_once("train", *RUN, f"{HALF_LIFE}{images}") / "run")
        for images in (20, 80)
    )
    assert same(both["current_model_state"], long["current_model_state"])
    assert both["averages"].keys() == {"20", "80"}
    assert same(both["averages"]["20"], short["averages"]["20"])
    assert same(both["averages"]["80"], long["averages"]["80"])
    assert not same(both["averages"]["20"], both["averages"]["80"])
    for one in (both, short):  # the average that is evaluated
        assert same(one["state_dict"], one["state_dict"] | one["averages"]["20"])
    assert same(long["state_dict"], long["state_dict"] | long["averages"]["80"])


def test_the_average_that_is_evaluated_is_stored_once(trained_once):
    one, both = (
        (trained_once("train", *run) / "run/checkpoints/last.ckpt").stat().st_size
        for run in ([*RUN, f"{HALF_LIFE}20"], TWO)
    )
    state = checkpoint_of(trained_once("train", *TWO) / "run")["averages"]["80"].values()
    assert both - one == pytest.approx(sum(value.nbytes for value in state), rel=0.2)


def test_all_averages_go_on_when_a_run_is_resumed(lab, tmp_path, trained_once, killed_at_step):
    whole = checkpoint_of(trained_once("train", *TWO) / "run")
    killed_at_step(6, "train", *TWO)
    assert checkpoint_of(tmp_path / "run")["global_step"] == 4
    lab.done("train", "resume=run")
    again = checkpoint_of(tmp_path / "run")
    for half_life in ("20", "80"):
        assert same(again["averages"][half_life], whole["averages"][half_life])
    assert same(again["state_dict"], whole["state_dict"])


@pytest.mark.slow
def test_a_resumed_run_may_evaluate_another_of_its_averages(lab, tmp_path, trained_once):
    lab.done("train", *TWO, "trainer.max_steps=4")
    other = [f"{HALF_LIFE}80", "callbacks.weight_averaging.also=[20,40]"]
    lab.done("train", "resume=run", "trainer.max_steps=6", *other)
    whole, again = (
        checkpoint_of(trained_once("train", *TWO) / "run"),
        checkpoint_of(tmp_path / "run"),
    )
    for half_life in ("20", "80"):
        assert same(again["averages"][half_life], whole["averages"][half_life])
    assert same(again["state_dict"], whole["state_dict"] | whole["averages"]["80"])
    assert again["averages"].keys() == {"20", "40", "80"}


@pytest.mark.slow
def test_commands_use_the_average_that_is_asked_for(lab, refusal, tmp_path, trained_once):
    run = trained_once("train", *TWO) / "run"
    checkpoint = checkpoint_of(run)
    states = {"20": checkpoint["averages"]["20"], "trained": checkpoint["current_model_state"]}
    states["80"] = checkpoint["averages"]["80"]
    images = {}
    for name, state in states.items():
        lab.done("export", f"run={run}", f"output={name}", f"average={name}")
        exported = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert same(exported, denoiser(state))
        draw = [f"run={run}", "num_samples=2", f"output={tmp_path}/{name}"]
        images[name] = lab.drawn(*draw, f"average={name}")["images"]
    default = lab.drawn(*draw)["images"]
    assert np.array_equal(default, images["20"])
    assert not np.array_equal(default, images["80"])
    assert not np.array_equal(default, images["trained"])
    sentence = refusal("sample", f"run={run}", "average=40")
    assert_names(sentence, "average=40", "trained", "20", "80")


@pytest.mark.slow
def test_an_average_is_another_way_to_sample(lab, refusal, run_folder):
    lab.done("evaluate", "run=run", "average=trained", "device=cpu")
    (record,) = (run_folder / "evaluations").glob("*.json")
    assert json.loads(record.read_text())["sampling"]["average"] == "trained"
    # metrics of one average are not compared with those of another
    sentence = refusal("evaluate", "run=run", "against=run", "average=500000", "device=cpu")
    assert_names(sentence, "average=trained", "average=500000")
