"""The commands, called from Python: the same results, and the same sentences as errors."""

import signal
from pathlib import Path

import pytest
from helpers.commands import prepare_for_commands
from helpers.refusals import refused
from helpers.tiny_runs import ALONE, TINY
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from diffusion_lab import command, runs
from diffusion_lab.training.callbacks import Throughput
from diffusion_lab.training.callbacks.stopping import SIGNALS


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, outside of any command."""
    prepare_for_commands(monkeypatch, tmp_path)
    GlobalHydra.instance().clear()
    return tmp_path


@pytest.mark.long
def test_a_run_is_measured_and_compared(run_folder):
    measured = command("evaluate", "run=run", "batch_size=16", "device=cpu", "sampler.steps=3")
    trained = runs.load_summary("run").metrics
    name = next(name for name in measured if name.startswith("fid/"))
    assert measured[name] == pytest.approx(trained[name], rel=0.01)  # precisions may differ
    compared = command("compare", "run", "output=report")
    assert list(compared["compositions"].values()) == [["run"]]
    assert Path("report/index.html").exists()


@pytest.mark.long
def test_a_run_returns_its_metric(workplace):
    value = command("train", *TINY, "run_dir=run", "optimized_metric=val/loss")
    assert value == runs.load_summary("run").metrics["val/loss"]


@pytest.mark.long
def test_a_run_is_trained_within_its_budget_and_named_by_its_options(workplace):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    budget = ["budget=images", "budget.images=9", "batch_size=8", "trainer.max_steps=2"]
    assert command("train", *TINY, *ALONE, *budget, "run_dir=run") is None
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert runs.load_summary("run").steps == 2
    assert runs.load_config("run").budget.solved[0] == "trainer.max_steps=2"
    assert runs.load_config("run").name == "fashion_mnist_dit"


def test_values_are_combined_as_on_the_command_line(workplace):
    found = command("profile", "backbone=mlp", "backbone.width=16,32", "speed=false")
    small, large = found["profiles"]
    assert small["params"] < large["params"]


def test_hydra_is_left_as_it_was(workplace):
    before = HydraConfig.instance().cfg
    command("profile", "backbone=mlp", "image_shape=[1,8,8]", "speed=false")
    with refused("backbone.pach"):
        command("train", "backbone=dit", "backbone.pach=2")
    assert HydraConfig.instance().cfg is before
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], "trian"),
        (["train", "backbone=dti"], "dit"),
        (["train", "objective=ddpm", "schedule=rectified"], "objective/prediction"),
        (["train", "-m", "seed=0,1"], "-m"),
        (["sample"], "run"),
    ],
)
def test_a_mistake_is_one_sentence(workplace, arguments, named):
    with refused(named):
        command(*arguments)
    assert not Path("outputs").exists()


def test_ctrl_c_saves_the_run_and_ends_the_program(workplace, monkeypatch):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(
        Throughput, "on_train_batch_end", lambda *_, **__: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        command("train", *TINY, *ALONE, "run_dir=run", "trainer.max_steps=100")
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert Path("run/checkpoints/last.ckpt").exists()
    assert not runs.load_summary("run").finished
