"""The costs of a composition agree with counts by hand, by PyTorch, and as published."""

import copy
import json
import shutil
import time

import pytest
import torch
from helpers.compositions import composed
from helpers.held_bytes import saved_bytes
from helpers.tiny_runs import summary_of
from torch import nn

from diffusion_lab.assembly.costs import ImageFacts, counted
from diffusion_lab.backbone.attention import CrossAttention, SelfAttention
from diffusion_lab.backbone.macs import Cost, by_level, count, seen_flops, total
from diffusion_lab.common.formats import amount
from diffusion_lab.common.labels import Classes
from diffusion_lab.estimate import profile
from diffusion_lab.estimate.profile import Bench, median_seconds
from diffusion_lab.estimate.run_cost import KeptTensors

META = "device=meta"
TINY = ["image_shape=[1,8,8]", "backbone=dit", "backbone.width=32", "backbone.heads=2"]


def macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    return total(count(module, lambda: module(*inputs))).macs


@pytest.mark.parametrize(
    ("module", "shapes", "expected"),
    [
        (nn.Linear(3, 5), [(1, 7, 3)], 7 * 3 * 5),
        (nn.Conv1d(4, 4, 3, groups=4), [(1, 4, 10)], 8 * 4 * 3),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), [(1, 4, 8, 8)], 6 * 4 * 4 * 2 * 9),
        (nn.ConvTranspose2d(4, 2, 2, 2), [(1, 4, 8, 8)], 4 * 8 * 8 * 2 * 4),
        (SelfAttention(8, 2), [(1, 5, 8)], 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8),
        (CrossAttention(8, 2, 6), [(1, 5, 8), (1, 3, 6)], 5 * 64 * 2 + 3 * 6 * 16 + 2 * 5 * 3 * 8),
        (nn.LayerNorm(4), [(1, 4)], 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_are_those_counted_by_hand_and_by_pytorch(module, shapes, expected):
    module = module.to("meta")
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    assert macs(module, *inputs) == expected
    assert seen_flops(lambda: module(*inputs)) == 2 * expected


def test_pytorch_does_not_see_a_recurrence():
    attention, x = SelfAttention(8, 2), torch.zeros(1, 5, 8)
    # on a CPU it sees attention from PyTorch 2.15 on
    assert seen_flops(lambda: attention(x)) <= 2 * macs(attention, x)
    cfg = composed("train", "name=x", "backbone=mamba2", "backbone.width=32", "backbone.depth=1")
    cost = counted(cfg, ImageFacts((1, 8, 8), Classes.numbered(4)))
    assert cost.seen_flops < 0.99 * cost.flops()


@pytest.mark.long
def test_few_macs_of_no_layer_are_counted_too(lab):
    small = ["backbone=diffusers_unet", "backbone.channels=32", "backbone.blocks=1"]
    result = lab.result("profile", *small, "image_shape=[1,8,8]", META)
    assert 2 * result["macs"] == result["flop_counter"]


def test_a_shared_module_is_listed_once_and_works_twice():
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.Sequential(layer, nn.Linear(4, 2, bias=False)))
    costs = count(network, lambda: network(torch.zeros(1, 4)))
    assert [(c.name, c.params, c.macs) for c in costs] == [
        ("", 0, 0),
        ("0", 20, 32),
        ("1", 0, 0),
        ("1.1", 8, 8),
    ]


def test_levels_share_the_whole_among_them():
    costs = [Cost("", 1, 0), Cost("a", 2, 3), Cost("a.b", 4, 5), Cost("a.b.c", 6, 7)]
    costs.append(Cost("d", 0, 0))
    assert by_level(costs, 1) == [Cost("", 1, 0), Cost("a", 12, 15)]
    assert by_level(costs, 2) == [Cost("", 1, 0), Cost("a", 2, 3), Cost("a.b", 10, 12)]
    for depth in (1, 2, 3):
        assert total(by_level(costs, depth)) == total(costs)


def test_activations_are_those_of_a_network_counted_by_hand():
    network = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    # the first layer keeps its input, SiLU its input, the last layer SiLU's output: all float32
    kept = 4 * (4 * 3 + 4 * 5 + 4 * 5)
    assert saved_bytes(lambda: network(x).sum(), network.parameters()) == kept
    # two views of one storage are one
    assert saved_bytes(lambda: network(x).sum() + network(x[:2]).sum(), network.parameters()) == (
        4 * 4 * 3 + (kept - 4 * 4 * 3) * 3 // 2
    )
    (tensors := KeptTensors()).keep_graph_of(network(x).sum())
    assert tensors.bytes(network.parameters()) == kept


@pytest.mark.long
def test_an_energy_is_measured(lab, monkeypatch):
    monkeypatch.setattr(profile, "PEAK_SECONDS", 0.01)
    fast = ["batch_size=2", "timed_steps=1", "device=cpu", "precision=32-true"]
    small = ["backbone=energy", "backbone.network.width=16", "sampler.steps=2"]
    result = lab.result("profile", "experiment=toy/score_matching", *small, *fast)
    # what the blocks' second layers are given and its gradient, 4 x 16 numbers each, in float32
    assert result["activation_bytes"] > 2 * 3 * 4 * 4 * 16
    assert result["training_images_per_second"] > 0


def test_steps_take_turns():
    order = []
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = median_seconds(steps, 3)
    assert order == ["a", "b"] * 5
    assert all(0 < taken < 0.1 for taken in seconds)


def test_slow_steps_are_taken_once(monkeypatch):
    monkeypatch.setattr(profile, "PATIENCE", 0.0)
    taken = []
    (seconds,) = median_seconds([lambda: taken.append(time.sleep(0.01))], 3)
    assert len(taken) == 1
    assert 0.01 <= seconds < 1


@pytest.mark.slow
def test_compositions_stand_side_by_side_and_agree_with_pytorch(lab):
    code, out, err = lab("profile", "-m", "backbone=unet,dit", "depth=1,3", META, "json=true")
    assert code == 0, err
    profiles = json.loads(out.splitlines()[-1])["profiles"]
    assert len(profiles) == 4
    for result in profiles:
        assert result["flop_counter"] == pytest.approx(result["flops"], rel=0.01)
    together = err[err.index("composition") :]
    for name in ("backbone=unet depth=1", "backbone=dit depth=3"):
        assert name in together
    assert amount(profiles[0]["params"]) in together


@pytest.mark.long
def test_the_table_lists_each_module_once_and_the_calls_of_a_sample_are_said(lab):
    few = ["objective=mean_flow", "sampler.steps=2", "guidance=none", "speed=false"]
    err = lab.done("profile", *TINY, *few, "depth=3", "device=meta")
    assert "Network calls per sample: 2\n" in err
    rows = [line.split("│")[1:-1] for line in err.splitlines() if line.startswith("│")]
    names = [row[0].strip() for row in rows]
    assert names[-1] == "all"
    assert "backbone.blocks.2" in names
    assert len(set(names)) == len(names)
    for column in (2, 4):
        shares = [float(row[column].strip().rstrip("%")) for row in rows[:-1]]
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


@pytest.mark.slow
def test_speed_and_memory_are_measured(lab):
    fast = ["batch_size=2", "timed_steps=1", "device=cpu", "precision=32-true", "compile=false"]
    sampling = ["sampler=heun", "sampler.steps=3", "guidance=classifier_free", "guidance.scale=2"]
    result = lab.result("profile", *TINY, *fast, *sampling)
    assert result["sampling_calls"] == 2 * 5
    assert result["sampling_images_per_second"] == pytest.approx(
        result["network_images_per_second"] / 10
    )
    for share in ("training_share_of_peak", "network_share_of_peak"):
        assert 0 < result[share] < 1
    # in float32, what the MLPs' second layers are given by 3 blocks: 4 tokens of 4 x 32, and GELU's
    assert result["activation_bytes"] > 4 * 3 * 4 * 128 * 2
    larger = lab.result("profile", *TINY, *fast, "batch_size=3")
    assert larger["activation_bytes"] == result["activation_bytes"]
    assert "peak_flops" in lab.result("profile", *TINY, *fast, "num_classes=0", "conditioning=none")


@pytest.mark.slow
def test_a_run_is_profiled_without_its_weights(lab, run_folder):
    shutil.rmtree(run_folder / "checkpoints")
    result = lab.result("profile", "run=run", META)
    summary = summary_of(run_folder)
    assert result["params"] == summary["parameters"]
    assert result["image_shape"] == [1, 8, 8]
    assert result["sampling_calls"] == 3
    # layers that are computed again in training are called once
    assert lab.result("profile", "run=run", META, "activation_checkpointing=true") == result
    # another backbone instead of the run's
    assert lab.result("profile", "run=run", "backbone=mlp", META)["params"] > 10 * result["params"]


@pytest.mark.slow
def test_a_train_composition_and_hydras_flags_are_taken(lab):
    result = lab.result("profile", "experiment=cifar10/dit", "sampler.steps=7", META)
    assert result["sampling_calls"] == 7
    assert lab.result("profile", "sampler=runge_kutta", META)["sampling_calls"] is None
    assert result["image_shape"] == [3, 32, 32]
    code, out, _ = lab("profile", "--cfg", "job", "backbone=dit")
    assert code == 0
    assert "timed_steps: 5" in out


@pytest.mark.long
def test_a_timed_step_trains_an_alignment():
    small = ["name=x", "backbone=dit", "backbone.width=16", "backbone.heads=1", "batch_size=2"]
    cfg = copy.deepcopy(composed("train", *small, "alignment=irepa"))
    facts = ImageFacts((1, 28, 28), Classes.numbered(10))
    bench = Bench(cfg, facts, torch.device("cpu"), "32-true")
    before = bench.alignment.projector[0].weight.clone()
    bench.train()
    assert not torch.equal(bench.alignment.projector[0].weight, before)


def test_a_timed_call_is_without_dropout():
    network = ("backbone=unet_small", "backbone.stage.dropout=0.9")
    cfg = copy.deepcopy(composed("profile", *network, "batch_size=2"))
    bench = Bench(cfg, ImageFacts((1, 8, 8), Classes.numbered(10)), torch.device("cpu"), "32-true")
    modes = []
    bench.model.denoiser.backbone.register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    bench.call()
    bench.train()
    assert modes == [False, True]
