"""Looks at training: speed, clock and memory, statistics of steps, losses by level."""

import math
from time import monotonic
from types import SimpleNamespace

import pytest
import torch
from helpers.faults import nan, spoil_loss
from helpers.pairs import first_fast
from helpers.tiny_runs import FAST, QUICK, TINY, TINY_AUTOENCODER, checkpoint_of, rows, summary_of
from torch import nn

from diffusion_lab.compute.device import OWN_MEMORY, PeakMemory
from diffusion_lab.families.autoencoder import task as autoencoder_task
from diffusion_lab.training.callbacks import SampleEvaluation, Throughput
from diffusion_lab.training.callbacks.statistics import GradientNoise, Look
from diffusion_lab.training.callbacks.throughput import bins_of
from diffusion_lab.training.logger import Clock, WandB

RUN = [*QUICK, *FAST, "trainer.precision=32-true", "callbacks.checkpoint.every_n_steps=1"]
LOOKS = ["callbacks.statistics.every_n_steps=1", "micro_batch_size=2"]
LOOKS.append("callbacks.statistics.noise_scale=true")
GROUPS = "parameter_groups=[{pattern:'*bias',lr:5e-3},{pattern:'*.embeddings.*',lr:0}]"
KINDS = ("weight_norm", "grad_norm", "update_norm", "activation_max")


def values(folder, start: str) -> dict[int, dict[str, float]]:
    """The values of names that start so, by step."""
    found: dict[int, dict[str, float]] = {}
    for row in rows(folder):
        named = {name: value for name, value in row.items() if name.startswith(start)}
        if named:
            found.setdefault(row["step"], {}).update(named)
    return found


def norm(tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.fixture(scope="module")
def looked(trained_once):
    """A run of four steps with a look at each."""
    return trained_once("train", *RUN, *LOOKS, GROUPS, "run_dir=run") / "run"


@pytest.mark.long
def test_a_callback_that_a_run_was_without_is_added_when_it_is_resumed(
    lab, tmp_path, killed_at_step
):
    without = ["callbacks.level_losses=null", "callbacks.throughput=null"]
    killed_at_step(4, "train", *RUN, *without, "run_dir=run")
    levels, rates = (
        f"callbacks.{key}={{_target_:diffusion_lab.training.callbacks.{name}}}"
        for key, name in (("level_losses", "LevelLosses"), ("throughput", "Throughput"))
    )
    lab.done("train", "resume=run", levels, rates)
    assert values(tmp_path / "run", "train_by_level/").keys() == {4}
    assert values(tmp_path / "run", "train/loss").keys() == {4}


@pytest.mark.slow
def test_looking_at_steps_changes_nothing_in_them(looked, trained_once):
    line = [*RUN, GROUPS, "micro_batch_size=2", "run_dir=run"]
    plain = trained_once("train", *line) / "run"
    first, second = checkpoint_of(plain), checkpoint_of(looked)
    assert str(first["optimizer_states"]) == str(second["optimizer_states"])
    for part in ("state_dict", "current_model_state"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert values(plain, name) == values(looked, name)
    assert values(plain, "train_weight_norm/") == {}


def test_norms_are_those_of_the_weights_their_update_and_the_gradient(looked):
    last, before = (
        checkpoint_of(looked, name)["current_model_state"] for name in ("last", "previous")
    )
    blocks = [name for name in last if name.startswith("denoiser.backbone.blocks.0.")]
    row = {
        name: value for kind in KINDS for name, value in values(looked, f"train_{kind}/")[4].items()
    }
    place = "backbone.blocks.0"
    assert row[f"train_weight_norm/{place}"] == pytest.approx(norm(last[n] for n in blocks))
    moved = norm(last[name] - before[name] for name in blocks)
    assert row[f"train_update_norm/{place}"] == pytest.approx(moved, rel=1e-4)
    assert values(looked, "train/weight_norm")[4] == {
        "train/weight_norm": pytest.approx(norm(last.values()))
    }
    for step, parts in values(looked, "train_grad_norm/").items():
        whole = values(looked, "train/grad_norm")[step]["train/grad_norm"]  # before clipping
        assert math.sqrt(sum(v**2 for v in parts.values())) == pytest.approx(whole, rel=1e-5)
    assert row["train_activation_max/backbone.out"] > 0
    # AdamW moves each weight by about its learning rate
    count = sum(last[name].numel() for name in blocks)
    assert row[f"train_update_norm/{place}"] < 1e-2 * math.sqrt(count) * 1.1


@pytest.mark.long
@pytest.mark.parametrize("step", first_fast([3, 4]))
def test_a_resumed_run_has_the_same_statistics(lab, tmp_path, killed_at_step, trained_once, step):
    several = ["trainer.max_steps=6", "trainer.log_every_n_steps=3", "run_dir=run"]
    command = ["train", *RUN, *LOOKS, *several]
    whole = trained_once(*command) / "run"
    killed_at_step(step, *command)
    lab.done("train", "resume=run")
    for start in ("train_", "train/noise", "train/grad", "train/loss", "train/update"):
        assert values(tmp_path / "run", start) == values(whole, start)
    assert list(values(whole, "train_by_level/")) == [3, 6]
    assert list(values(whole, "train_update_norm/")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_skipped_steps_leave_no_statistics(lab, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, [2], nan)
    lab.done("train", *RUN, *LOOKS, "run_dir=run")
    for start in ("train_grad_norm/", "train_by_level/", "train/grad_norm", "train/noise_scale"):
        found = values(tmp_path / "run", start)
        assert 2 not in found
        assert all(math.isfinite(value) for row in found.values() for value in row.values())
        if start != "train/noise_scale":  # which is not known at every step
            assert set(found) == {1, 3, 4}


def test_the_losses_by_level_have_the_mean_of_the_loss(looked):
    def row(step: int) -> dict[str, float]:
        return values(looked, "train_by_level/")[step]

    for step, loss in values(looked, "train/loss").items():
        assert min(row(step).values()) <= loss["train/loss"] <= max(row(step).values())
        assert set(row(step)) <= {f"train_by_level/t{0.05 + 0.1 * i:.2f}" for i in range(10)}


def test_a_level_is_counted_in_its_tenth():
    t = torch.tensor([1e-6, 0.1, 0.1001, 0.55, 0.9999, 1.0], dtype=torch.float64)
    assert bins_of(t).tolist() == [0, 0, 1, 5, 9, 9]


def test_rates_of_groups_are_logged(looked):
    rates = values(looked, "train/lr")[1]
    assert sorted(rates) == ["train/lr", "train/lr_group1", "train/lr_group2"]
    assert rates["train/lr"] == pytest.approx(1e-2)
    assert sorted(rates.values()) == pytest.approx([0, 5e-3, 1e-2])


@pytest.mark.slow
def test_the_largest_gradient_of_a_row_is_kept_beside_the_mean(lab, tmp_path, looked):
    one_row = ["trainer.log_every_n_steps=4", "micro_batch_size=2", "run_dir=run"]
    lab.done("train", *RUN, GROUPS, *one_row)
    norms = [row["train/grad_norm"] for row in values(looked, "train/grad_norm").values()]
    (row,) = values(tmp_path / "run", "train/grad_norm").values()
    assert row["train/grad_norm"] == pytest.approx(sum(norms) / 4)
    assert row["train/grad_norm_max"] == max(norms)


# ----------------------------------------------------------------------------------------------
# the gradient noise scale


def test_expected_squared_norms_give_the_noise_scale():
    signal, noise, estimate = 0.5, 40.0, GradientNoise()
    for _ in range(3):
        estimate.observe(signal + noise / 4, signal + noise / 32, 4, 32)
    assert estimate.scale == pytest.approx(noise / signal)
    hidden = GradientNoise()
    hidden.observe(1.0, 0.1, 4, 32)  # |G|^2 is below 0
    assert hidden.scale is None


def test_noisy_gradients_give_about_the_noise_scale():
    generator, estimate = torch.Generator().manual_seed(0), GradientNoise()
    mean = torch.ones(100)
    for _ in range(400):
        gradients = mean + 3 * torch.randn(8, 4, 100, generator=generator)  # parts of four
        parts = gradients.mean(1)
        estimate.observe(
            float(parts.square().sum(1).mean()), float(parts.mean(0).square().sum()), 4, 32
        )
    assert estimate.scale == pytest.approx(9, rel=0.2)  # tr(S) / |G|^2 = 900 / 100


class Trained(nn.Linear):
    """A module of which all parameters are trained."""

    device = torch.device("cpu")

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


def test_norms_of_parts_are_of_single_micro_batches():
    torch.manual_seed(0)
    layer, norms = Trained(3, 2), []
    look = Look(layer, depth=1, in_parts=True)
    torch.autograd.grad(layer(torch.ones(3)).sum(), list(layer.parameters()))  # does not count
    for batch in torch.randn(3, 5, 3):
        alone = torch.autograd.grad(layer(batch).square().mean(), list(layer.parameters()))
        norms.append(norm(alone) ** 2)
        look.in_backward = True
        layer(batch).square().mean().backward()
        look.in_backward = False
    assert float(look.squares) == pytest.approx(sum(norms))
    look.close()
    look.in_backward = True
    layer(torch.ones(3)).sum().backward()
    assert float(look.squares) == pytest.approx(sum(norms))


# ----------------------------------------------------------------------------------------------
# several processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_statistics_of_one(lab, tmp_path, strategy):
    common = [*RUN, "name=x", "callbacks.statistics.every_n_steps=2"]
    scale = "callbacks.statistics.noise_scale=true" if strategy == "ddp" else "seed=0"
    lab.done("train", *common, scale, "micro_batch_size=4", "run_dir=one")
    several = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    lab.done("train", *common, *several, "trainer.precision=32-true", scale, "run_dir=two")
    for start in ("train_", "train/grad", "train/update", "train/weight", "train/noise"):
        one, two = values(tmp_path / "one", start), values(tmp_path / "two", start)
        assert one.keys() == two.keys()
        for step, row in one.items():
            assert two[step] == pytest.approx(row, rel=2e-3, abs=1e-6)
    assert list(values(tmp_path / "two", "train_grad_norm/")) == [2, 4]


def test_a_resumed_window_is_on_the_device_of_the_module():
    throughput = Throughput()
    # a checkpoint is read before the module is on its device
    saved = {"losses_since_the_last_row": torch.tensor([1.0, 2.0])}
    saved["gradient_norms_since_the_last_row"] = torch.tensor([3.0, 4.0])
    throughput.on_load_checkpoint(None, SimpleNamespace(device=torch.device("cpu")), saved)
    module = SimpleNamespace(
        device=torch.device("meta"), context=SimpleNamespace(clock=Clock(batch_size=1))
    )
    throughput.on_train_start(SimpleNamespace(callbacks=[]), module)
    assert {each.device.type for pair in throughput._window for each in pair} == {"meta"}


@pytest.fixture
def late(monkeypatch) -> list[float]:
    """The seconds by which the clock of a run is ahead, which a test increases."""
    late = [0.0]
    monkeypatch.setattr(
        "diffusion_lab.training.logger.run_logger.time",
        SimpleNamespace(monotonic=lambda: monotonic() + late[0]),
    )
    return late


@pytest.mark.long
def test_the_clock_of_a_run_stands_still_while_it_is_evaluated_or_reaches_w_and_b(
    lab, tmp_path, monkeypatch, late
):
    def run(self, trainer):
        late[0] += 1000
        for logger in trainer.loggers:
            logger.log_metrics({"fid/x": 1.0}, step=trainer.global_step)
        late[0] += 1000

    def start(self):
        late[0] += 1000

    monkeypatch.setattr(SampleEvaluation, "run", run)
    monkeypatch.setattr(WandB, "start", start)
    asked = ["callbacks.evaluation.every_n_steps=2", "trainer.max_steps=4"]
    asked += ["callbacks.sample_grid=null", "callbacks.denoising=null"]
    lab.done("train", *TINY, *asked, "run_dir=run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "fid/x" in row] == [2, 4]
    assert max(row["seconds"] for row in found) < 1000
    assert all(row.get("train/images_per_second", 1) > 8 / 1000 for row in found)
    summary = summary_of(tmp_path / "run")
    assert summary["training_seconds"] < 1000
    assert 5000 <= summary["wall_seconds"] < 6000  # to a tenth of a second

    # counted and uncounted seconds are those of the whole run, including before a resume
    late[0] += 10_000
    asked = ["trainer.max_steps=6", "callbacks.evaluation.every_n_steps=null"]
    lab.done("train", "resume=run", *asked)
    summary = summary_of(tmp_path / "run")
    assert summary["training_seconds"] < 1000
    assert 5000 <= summary["wall_seconds"] < 6000  # to a tenth of a second


def test_measuring_latents_is_no_training(lab, tmp_path, monkeypatch, late):
    def measured(*of):
        late[0] += 1000
        return latent_moments(*of)

    latent_moments = autoencoder_task.latent_moments
    monkeypatch.setattr(autoencoder_task, "latent_moments", measured)
    asked = ["callbacks.evaluation=null", "callbacks.sample_grid=null", "run_dir=run"]
    lab.done("train-autoencoder", *TINY_AUTOENCODER, *asked)
    summary = summary_of(tmp_path / "run")
    assert summary["training_seconds"] < 1000 < summary["wall_seconds"]


@pytest.mark.slow
@pytest.mark.skipif(not OWN_MEMORY.exists(), reason="the process's memory is read from Linux")
def test_the_peak_of_memory_is_that_of_training():
    whole = PeakMemory(torch.device("cpu"))
    before = whole.bytes()
    large = torch.ones(100 * 2**20)  # 400 MiB
    with whole.stopped():
        larger = torch.ones(200 * 2**20)
        del larger
    assert 350 * 2**20 < whole.bytes() - before < 450 * 2**20
    del large
    next_run = PeakMemory(torch.device("cpu"))
    assert whole.bytes() - next_run.bytes() > 300 * 2**20
    with next_run.stopped():
        kept = torch.ones(50 * 2**20)
    assert next_run.bytes() - before > kept.nbytes / 2  # memory that stays is also training's


def test_where_a_peak_cannot_be_told_from_earlier_ones_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_lab.compute.device.OWN_MEMORY", tmp_path / "none" / "status")
    assert PeakMemory(torch.device("cpu")).bytes() is None
    (tmp_path / "status").write_text("VmRSS:  12 kB\n")  # some containers show only this
    monkeypatch.setattr("diffusion_lab.compute.device.OWN_MEMORY", tmp_path / "status")
    assert PeakMemory(torch.device("cpu")).bytes() is None
