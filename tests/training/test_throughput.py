"""Tests of the rows of loss and speed, the run's clock and its peak memory."""

import json
from time import monotonic
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_runs import TINY, TINY_AUTOENCODER, summary_of

from diffusion_lab.compute.device import OWN_MEMORY, PeakMemory
from diffusion_lab.families.autoencoder import task as autoencoder_task
from diffusion_lab.training.callbacks import SampleEvaluation, Throughput
from diffusion_lab.training.logger import Clock, WandB


def test_a_resumed_window_is_on_the_device_of_the_module():
    throughput = Throughput()
    # a checkpoint is read before the module is on its device
    saved = {"losses_since_the_last_row": torch.tensor([1.0, 2.0])}
    saved["gradient_norms_since_the_last_row"] = torch.tensor([3.0])
    throughput.on_load_checkpoint(None, SimpleNamespace(device=torch.device("cpu")), saved)
    module = SimpleNamespace(
        device=torch.device("meta"), context=SimpleNamespace(clock=Clock(batch_size=1))
    )
    throughput.on_train_start(SimpleNamespace(callbacks=[]), module)
    assert [loss.device.type for loss in throughput._losses] == ["meta", "meta"]


@pytest.fixture
def late(monkeypatch) -> list[float]:
    """The seconds by which the clock of a run is ahead, which a test increases."""
    late = [0.0]
    monkeypatch.setattr(
        "diffusion_lab.training.logger.run_logger.time",
        SimpleNamespace(monotonic=lambda: monotonic() + late[0]),
    )
    return late


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
    lab.done("train", *TINY, *asked, "run_dir=run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "fid/x" in row] == [2, 4]
    assert max(row["seconds"] for row in rows) < 1000
    assert all(row.get("train/images_per_second", 1) > 8 / 1000 for row in rows)
    summary = summary_of(tmp_path / "run")
    assert summary["training_seconds"] < 1000
    assert 5000 < summary["wall_seconds"] < 6000

    # counted and uncounted seconds are those of the whole run, including before a resume
    late[0] += 10_000
    asked = ["trainer.max_steps=6", "callbacks.evaluation.every_n_steps=null"]
    lab.done("train", "resume=run", *asked)
    summary = summary_of(tmp_path / "run")
    assert summary["training_seconds"] < 1000
    assert 5000 < summary["wall_seconds"] < 6000


def test_measuring_latents_is_no_training(lab, tmp_path, monkeypatch, late):
    def measured(*of):
        late[0] += 1000
        return latent_moments(*of)

    latent_moments = autoencoder_task.latent_moments
    monkeypatch.setattr(autoencoder_task, "latent_moments", measured)
    asked = ["callbacks.evaluation=null", "logger=none", "run_dir=run"]
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
