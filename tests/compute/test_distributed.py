"""Batches are divided among ranks; two of them train, sample and measure as one process does."""

import multiprocessing
import os
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.refusals import refused
from helpers.tiny_runs import ADVERSARIAL, TINY, TINY_AUTOENCODER, checkpoint_of, same, summary_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusion_lab.common.images import NotDrawn, NotFinite
from diffusion_lab.compute import distributed
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.distributed import (
    failing_together,
    gather_shards,
    on_rank_zero,
    own_batches,
    shard,
)
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.training.callbacks.weight_averaging import WeightAverage


def test_layout_multiplies_to_the_global_batch():
    asked = {(128, 1, None): (128, 1), (128, 4, None): (32, 1), (128, 2, 16): (16, 4)}
    for (batch, world, micro), expected in (asked | {(8, 8, 1): (1, 1)}).items():
        layout = solve_batch(batch, world, micro)
        assert (layout.micro_batch, layout.accumulate) == expected
        assert layout.micro_batch * layout.accumulate * world == batch
    said = "global batch 128 = micro-batch 16 x 4 accumulated x 2 ranks"
    assert str(solve_batch(128, 2, 16)) == said


@pytest.mark.parametrize(
    ("batch", "world", "micro", "hint"),
    [
        (100, 3, None, "batch_size=99 or batch_size=102"),
        (2, 4, None, "batch_size=4 or batch_size=8"),
        (128, 2, 24, "micro_batch_size=16"),
        (128, 2, 0, "micro_batch_size=1"),
        (12, 1, 100, "micro_batch_size=12"),
        (0, 1, None, "batch_size=0"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_to_write(batch, world, micro, hint):
    with refused(hint):
        solve_batch(batch, world, micro)


def test_shards_cover_every_id_once_and_may_be_uneven():
    shards = [shard(10, rank, 4) for rank in range(4)]
    assert sorted(i for ids in shards for i in ids) == list(range(10))
    assert [len(ids) for ids in shards] == [3, 3, 2, 2]
    assert shard(2, 3, 4) == []


@pytest.mark.parametrize(
    ("count", "batches"),
    [(7, [[[0, 3], [6]], [[1, 4]], [[2, 5]]]), (2, [[[0]], [[1]], []])],
)
def test_rows_are_gathered_in_the_order_of_their_ids(monkeypatch, count, batches):
    def broadcast(sent, src):
        assert not any(shard() is not None for shard in sent_before), "all of them are held"
        sent[0] = torch.cat([torch.tensor(ids) for ids in batches[src]])
        sent_before.append(weakref.ref(sent[0]))

    sent_before: list[weakref.ref] = []
    counts = [sum(map(len, of_rank)) for of_rank in batches]
    monkeypatch.setattr(distributed, "of_all_ranks", lambda _: counts)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank_and_world", lambda rank=rank: (rank, 3))
        assert own_batches(count, 2) == batches[rank]
        gathered = gather_shards([torch.tensor(ids) for ids in batches[rank]])
        assert gathered.tolist() == list(range(count))


def test_one_process_gathers_its_own_rows():
    assert gather_shards([torch.tensor([0, 1]), torch.tensor([2])]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("here", [True, False])
def test_what_fails_on_one_rank_fails_on_all(monkeypatch, here):
    monkeypatch.setattr(
        distributed, "of_all_ranks", lambda said: [None, said or (NotFinite, "2 of 3")]
    )
    with refused("2 of 3", by=NotFinite), failing_together(NotDrawn):
        if here:
            raise NotFinite("2 of 3")


def saved_average(rank: int, begin: dict) -> dict:
    """The tensors that a checkpoint has of an average of sharded parameters which begins so."""
    module = torch.nn.Linear(2, 3)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return WeightAverage(module, begin).to_save()


def test_an_average_that_one_process_has_sharded_is_saved(tmp_path):
    begin = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    (saved,) = on_ranks(1, tmp_path, saved_average, begin)
    assert same(saved, begin)


def compute_slowly(rank: int, folder: Path) -> None:
    """Writes what a rank gets of a value that the first computes longer than others wait."""
    patience = timedelta(seconds=4)
    distributed.dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience
    )
    (folder / f"rank{rank}").write_text(on_rank_zero(lambda: time.sleep(6) or "computed"))
    os._exit(0)  # without what pytest does at its end


@pytest.mark.slow
def test_the_others_wait_longer_for_what_the_first_computes_alone(tmp_path):
    context = multiprocessing.get_context("fork")  # a new process would import for seconds
    ranks = [context.Process(target=compute_slowly, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["computed"] * 2


@pytest.mark.slow
def test_noise_levels_are_spread_over_a_global_batch_and_their_losses_seen_by_all(lab, tmp_path):
    spread = ["objective/time_sampler=second_moment", "objective.time_sampler.stratified=true"]
    parts = ["objective.time_sampler.bins=8", "micro_batch_size=2", "trainer.devices=2"]
    lab.done("train", *TINY, *spread, *parts, "run_dir=two", "callbacks.evaluation=null")
    summary = summary_of(tmp_path / "two")
    assert (summary["ranks"], summary["images_seen"]) == (2, 4 * 8)
    state = checkpoint_of(tmp_path / "two")["state_dict"]
    (seen,) = (value for name, value in state.items() if name.endswith("time_sampler.count"))
    # 4 steps with one of the 8 images in each eighth of the noise levels
    assert seen.tolist() == [4] * 8


@pytest.mark.slow
@pytest.mark.parametrize("extra", [ADVERSARIAL, ["autoencoder=vq", "autoencoder.codes=8"]])
def test_two_ranks_train_and_measure_an_autoencoder_as_one(lab, tmp_path, extra):
    exact = ["trainer.precision=32-true", "trainer.devices=2", "run_dir=two"]
    lab.done("train-autoencoder", *TINY_AUTOENCODER, *extra, *exact)
    two = summary_of(tmp_path / "two")
    assert (two["steps"], two["ranks"]) == (4, 2)
    _, facts, _ = saving.load_autoencoder(tmp_path / "two" / saving.FIRST_STAGE_FILE)
    assert facts.metrics == two["metrics"]

    (tmp_path / "two" / saving.FIRST_STAGE_FILE).unlink()  # so that it is measured anew
    lab.done("train-autoencoder", "resume=two", "trainer.devices=1")
    one = summary_of(tmp_path / "two")
    assert one["ranks"] == 1
    assert {"rfid/efficientnet_lite0-96/train64-16", "val/psnr"} <= set(one["metrics"])
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-5, abs=1e-6)
