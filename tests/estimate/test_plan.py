"""A plan has the bytes of real runs, a roofline's times, and says what does not fit."""

import json
import math
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from helpers.held_bytes import HeldBytes
from helpers.pairs import first_fast
from helpers.paths import ROOT
from helpers.tiny_runs import TINY, tiny_first_stage

from diffusion_lab.estimate.gpu import CONTEXT

PARTS = [
    *(*TINY, "name=x", "backbone.depth=3", "batch_size=16", "micro_batch_size=4"),
    *("callbacks.weight_averaging.also=[40]", "callbacks.posthoc_ema.snapshots=2"),
    *("callbacks.evaluation=null", "callbacks.sample_grid=null", "trainer.precision=32-true"),
]
HELD = f"+callbacks.held={{_target_:{HeldBytes.__module__}.HeldBytes,folder:held}}"
DIT = ["backbone=dit_xl_2", "image_shape=[4,32,32]", "num_classes=1000", "latents=true"]
SMALL = ["backbone=mlp", "backbone.width=64", "image_shape=[1,8,8]", "num_classes=4"]


@pytest.fixture
def planned(lab):
    """A function: planned("gpu=a100", ...) -> the plan."""
    return partial(lab.result, "plan")


def assert_held(lab, planned, ranks: int, *overrides: str) -> None:
    """Trains, and compares what each rank holds with the plan of the same command line."""
    lab.done("train", *PARTS, *overrides, HELD, "logger=none", "run_dir=run")
    plan = planned(*PARTS, *overrides)
    for rank in range(ranks):
        for name, size in json.loads(Path(f"held/rank{rank}.json").read_text()).items():
            assert plan["memory"][name] == pytest.approx(size, rel=0.1), name
    written = Path("run/checkpoints/last.ckpt").stat().st_size
    assert plan["disk"]["checkpoint"] == pytest.approx(written, rel=0.3)  # names and zip are more
    snapshots = sum(path.stat().st_size for path in Path("run/snapshots").iterdir())
    assert plan["disk"]["snapshots"] == pytest.approx(snapshots, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    first_fast(
        [
            ["activation_checkpointing=false"],
            ["optimizer=muon", "schedule=ddpm_linear", "objective=improved_ddpm", "sampler=ddpm"],
            [
                *("objective/loss/uncertainty=learned", "optimizer=any", "optimizer.lr=0.1"),
                *("optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.9"),
            ],
        ]
    ),
)
def test_one_process_holds_what_was_planned(lab, planned, overrides):
    assert_held(lab, planned, 1, "trainer.devices=1", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_hold_what_was_planned(lab, planned, strategy):
    several = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    assert_held(lab, planned, 2, *several)


@pytest.mark.slow
def test_shares_are_of_rows_and_one_rank_shares_nothing(planned):
    one, eight, sharded = (
        planned(*SMALL, *each)["memory"]
        for each in (["devices=1"], ["devices=8"], ["devices=8", "trainer=fsdp"])
    )
    assert one["gathered"] == eight["gathered"] == 0
    assert eight["gradients"] == one["gradients"]
    assert one["optimizer"] == pytest.approx(2 * one["parameters"], rel=0.01)
    for name in ("gradients", "optimizer", "averages"):
        assert one[name] / 8 <= sharded[name] < 1.5 * one[name] / 8
    assert sharded["activations"] == eight["activations"]


@dataclass(frozen=True)
class Published:
    """A published run's images/s, and bytes by nvidia-smi, beside what was planned."""

    overrides: list[str]
    speed: float
    planned: float
    memory: float | None = None
    planned_memory: float | None = None


UNCONDITIONAL = ["num_classes=0", "conditioning=none", "trainer.precision=32-true"]
CIFAR = [*UNCONDITIONAL, "image_shape=[3,32,32]", "batch_size=128", "devices=1"]
EDM = ["experiment=cifar10/edm", "devices=8", "gpu=v100", *UNCONDITIONAL]
DAY = 24 * 3600
PUBLISHED = [
    Published(  # README of fast-DiT
        [
            *(*DIT, "gpu=a100", "devices=1", "batch_size=128", "trainer.precision=16-mixed"),
            *("activation_checkpointing=true", "optimizer.fused=false"),
        ],
        *(0.84 * 128, 107, 27_485 * 2**20, 26.3e9),
    ),
    Published(  # facebookresearch/DiT, issue 22: float32, then TF32; images encoded in each step
        [*DIT, "gpu=a100", "devices=8", "batch_size=256", "trainer.precision=32-true"],
        *(0.51 * 256, 141),
    ),
    # README of EDM, "~2 days", "~4 days" and "~13 days"
    Published([*EDM, "image_shape=[3,32,32]"], 200e6 / (2 * DAY), 640),
    Published(
        [
            *(*EDM, "image_shape=[3,64,64]", "batch_size=256"),
            *("backbone.multipliers=[1,2,2,2]", "backbone.attention=[2]"),
        ],
        *(200e6 / (4 * DAY), 324),
    ),
    Published(
        [
            *("backbone=unet_adm", "image_shape=[3,64,64]", "num_classes=1000", "gpu=a100"),
            *("nodes=4", "devices=8", "batch_size=4096", "micro_batch_size=64"),
            "trainer.precision=16-mixed",
        ],
        *(2500e6 / (13 * DAY), 2267),
    ),
    Published(  # gnobitab/RectifiedFlow, issue 12: 1.3M steps in 5 days
        [*CIFAR, "backbone=unet_ddpmpp", "backbone.multipliers=[1,2,2,2]", "gpu=a100"],
        *(1.3e6 * 128 / (5 * DAY), 344),
    ),
    # atong01/conditional-flow-matching, issue 105; 400k steps in 19 h
    Published(
        [*CIFAR, "backbone=unet_ddpm", "gpu=v100", "optimizer.fused=false"],
        *(1.84 * 128, 272, 15_424 * 2**20, 9.15e9),
    ),
    Published([*CIFAR, "backbone=unet_ddpm", "gpu=rtx_4090"], 400e3 * 128 / (19 * 3600), 1411),
]


@pytest.mark.slow
@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.overrides[0])
def test_published_speeds_and_memory_are_planned_within_a_factor_of_two(planned, run):
    plan = planned(*run.overrides)
    assert plan["images_per_second"] == pytest.approx(run.planned, rel=0.01)
    assert 1 / 2 < run.planned / run.speed < 2
    numbers = [f"{run.speed:,.0f} | {run.planned:,} |"]
    if run.memory is not None:
        assert plan["memory"]["shown"] == pytest.approx(run.planned_memory, rel=0.01)
        assert 1 / 2 < run.planned_memory / run.memory < 1.2
        numbers.append(f"{run.memory / 1e9:.1f} | {run.planned_memory / 1e9:.1f} |")
    page = (ROOT / "docs/pages/scale.md").read_text()
    assert all(each in page for each in numbers)


@pytest.mark.slow
def test_a_batch_that_was_out_of_memory_does_not_fit(lab):
    """DiT-XL/2 in float32 on an A100, without checkpointing and encoding (README of fast-DiT)."""
    run = ["gpu=a100_40gb", "devices=1", "batch_size=128", "trainer.precision=16-mixed"]
    code, out, _ = lab("plan", *DIT, *run, "json=true")
    plan = json.loads(out.splitlines()[-1])
    assert code == 1
    assert not plan["fits"]
    assert 0 < plan["largest_micro_batch"] < 128


@pytest.mark.long
def test_a_small_network_waits_for_the_host_in_steps_and_in_samples(planned):
    run = ["experiment=quickstart", "image_shape=[1,28,28]", "num_classes=10", "devices=1"]
    run += ["backbone.multipliers=[1,2]", "backbone.attention=[1]"]
    plan = planned(*run)
    step, sampling = plan["step"], plan["duration"]["sampling"]
    assert step["seconds"] == step["host"] > 10 * step["compute"]
    assert step["host"] == pytest.approx(1.5e-3 + 4e-6 * plan["operations"])
    assert plan["operations"] > 1000
    quicker = planned(*run, "launch=1e-9")
    assert quicker["step"]["host"] == pytest.approx(1.5e-3, rel=0.01)
    assert quicker["duration"]["sampling"] < sampling


@pytest.mark.long
def test_kinds_of_products_reach_other_shares_of_their_peaks(planned):
    shape = ["image_shape=[3,32,32]", "num_classes=10", "devices=1", "gpu=a100", "sampler.steps=1"]
    dit = ["backbone=dit", "backbone.depth=1"]
    shallow = ["backbone.multipliers=[1]", "backbone.attention=[]"]
    kinds = {
        "convolutions": (["backbone=unet_small", *shallow], 0.15 * 312e12),
        "matrix products": (dit, 0.33 * 312e12),
        "state spaces": (["backbone=mamba2", "backbone.depth=1"], 0.2 * 312e12),
    }
    for kind, (backbone, reached) in kinds.items():
        plan = planned(*backbone, *shape)
        assert plan["kind"] == kind
        images = plan["batch_size"]
        assert plan["step"]["compute"] == pytest.approx(images * 6 * plan["macs"] / reached)
    exact, plain, tf32 = (
        planned(*dit, *shape, "trainer.precision=32-true", *each)["step"]["compute"]
        for each in (["matmul_precision=highest"], [], ["matmul_precision=high"])
    )
    assert exact >= plain > 3 * tf32


@pytest.mark.long
def test_times_are_those_of_a_roofline_by_hand(planned):
    network = ["backbone=dit_s_2", "image_shape=[3,32,32]", "num_classes=10"]
    run = ["gpu=h100", "nodes=2", "devices=4", "batch_size=512", "mfu=0.5", "launch=1e-9"]
    plan = planned(*network, *run)
    macs, step, gpu = plan["macs"], plan["step"], plan["gpu"]
    assert macs == pytest.approx(6.05e9, rel=0.002)
    assert step["compute"] == pytest.approx(64 * 3 * 2 * macs / (0.5 * 989e12))
    weights = 4 * plan["parameters"]
    # four 50 GB/s adapters a node are slower than NVLink; an all-reduce sends 2 (n - 1) / n
    assert step["communication"] == pytest.approx(2 * 7 / 8 * weights / (0.8 * 200e9))
    assert step["waiting"] == 0
    # parameters, two moments, an average: read and written; gradients thrice; the average's source
    assert step["update"] == pytest.approx((2 * 4 + 3 + 1) * weights / gpu["bandwidth"], rel=0.01)
    assert step["seconds"] == pytest.approx(step["compute"] + step["update"])
    assert plan["images_per_second"] == pytest.approx(512 / step["seconds"])
    used = 3 * 2 * macs * plan["images_per_second"] / (8 * 989e12)
    assert plan["share_of_peak"] == pytest.approx(used)
    assert plan["duration"]["training"] == pytest.approx(
        plan["duration"]["steps"] * step["seconds"]
    )


@pytest.mark.slow
def test_guesses_and_the_gpu_are_overridden_on_the_command_line(planned):
    plan = planned(*SMALL, "devices=2")
    assert plan["guesses"] == {"mfu": 0.33, "launch": 4e-6, "link_share": 0.8, "reserve": 0.2}
    other = planned(
        *(*SMALL, "devices=2", "mfu=0.66", "link_share=0.4", "reserve=0.5"),
        *("gpu.bandwidth=1e12", "gpu.name=mine"),
    )
    assert other["step"]["compute"] == pytest.approx(plan["step"]["compute"] / 2)
    assert other["step"]["communication"] == pytest.approx(2 * plan["step"]["communication"])
    assert other["step"]["update"] == pytest.approx(3.35 * plan["step"]["update"])
    assert other["memory"]["usable"] == pytest.approx(plan["memory"]["usable"] * 5 / 8)
    assert other["gpu"]["name"] == "mine"


@pytest.mark.slow
def test_slow_links_are_waited_for_and_accumulation_hides_them(planned):
    slow = [*SMALL, "devices=2", "batch_size=64", "gpu.link=1e6"]
    ddp = planned(*slow)["step"]
    assert ddp["waiting"] == pytest.approx(ddp["communication"], rel=0.01)
    assert planned(*slow, "micro_batch_size=8")["step"]["communication"] == ddp["communication"]
    fsdp = planned(*slow, "micro_batch_size=8", "trainer=fsdp")["step"]
    assert fsdp["communication"] == pytest.approx(4 * 1.5 * ddp["communication"])


@pytest.mark.slow
def test_recomputed_and_doubled_passes_take_time(planned):
    once = planned(*SMALL)["step"]["compute"]
    again = planned(*SMALL, "activation_checkpointing=true")
    assert again["step"]["compute"] == pytest.approx(4 / 3 * once)
    assert again["share_of_peak"] < 0.33 * 3 / 4
    twice = planned(*SMALL, "denoiser.self_conditioning=true")
    passes = twice["step"]["compute"] * 0.33 * 989e12 / (2 * twice["macs"] * 128 / 8)
    assert passes == pytest.approx(3.5)


@pytest.mark.slow
def test_the_run_ends_by_steps_or_by_its_time_limit(planned):
    whole = planned(*SMALL, "trainer.max_steps=1000", "callbacks.evaluation.every_n_steps=100")
    drawn = whole["duration"]["sampling"]
    assert whole["duration"]["steps"] == 1000
    fewer = planned(*SMALL, "trainer.max_steps=1000")["duration"]["sampling"]
    assert drawn > 5 * fewer
    lasting = planned(*SMALL, "budget=seconds", "budget.seconds=3600")
    training = lasting["duration"]["training"] + lasting["duration"]["validation"]
    assert training == pytest.approx(3600, rel=0.01)
    assert planned(*SMALL, "sampler=runge_kutta")["duration"]["sampling"] is None


@pytest.mark.slow
def test_caches_have_the_sizes_of_real_ones(lab, planned, run_folder):
    (features,) = Path("data/reference").glob("train*-efficientnet*.pt")
    plan = planned(*TINY, "name=x", "devices=1", "num_images=64", "metrics.reference_size=64")
    assert plan["disk"]["features"] == pytest.approx(features.stat().st_size, rel=0.1)
    assert plan["disk"]["latents"] == 0
    stage = ["first_stage=kl", f"first_stage.run={tiny_first_stage(Path('stage'))}"]
    lab.done("train", *TINY, *stage, "run_dir=latent", "data.flip=true")
    written = sum(path.stat().st_size for path in Path("data/latents").iterdir())
    plan = planned(*TINY, "name=x", "devices=1", *stage, "num_images=64", "data.flip=true")
    assert plan["disk"]["latents"] == pytest.approx(written, rel=0.3)
    cached = plan["memory"]["images"]
    assert cached == plan["disk"]["latents"]
    later = planned(*TINY, "name=x", "devices=1", *stage, "first_stage.cache=false")
    assert later["step"]["encoding"] > 0 == plan["step"]["encoding"]
    assert later["disk"]["latents"] == 0 < later["memory"]["first_stage"]


@pytest.mark.long
def test_latents_of_a_first_stage_that_is_not_here(planned):
    latents = ["image_shape=[4,8,8]", "num_classes=4", "latents=true"]
    plan = planned("backbone=mlp", *latents, "num_images=1000", "data.flip=true", "devices=1")
    assert plan["disk"]["latents"] == 1000 * 2 * 4 * math.prod((8, 8, 8))
    assert plan["disk"]["checkpoint"] == pytest.approx(16 * plan["parameters"], rel=0.01)


@pytest.mark.slow
def test_a_grid_of_many_classes_has_the_rows_that_are_drawn(planned):
    once = ["callbacks.evaluation=null", "callbacks.denoising=null", "trainer.max_steps=100"]
    grid = [*once, "callbacks.sample_grid.every_n_steps=100", "callbacks.sample_grid.columns=10"]
    few, many = (planned(*SMALL[:-1], *grid, f"num_classes={n}") for n in (100, 1000))
    assert many["duration"]["sampling"] == pytest.approx(few["duration"]["sampling"], rel=0.05)


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_to_write(lab):
    run = [*SMALL, "devices=2", "trainer.precision=32-true"]
    memory = lab.result("plan", *run)["memory"]
    state, half = (memory["total"] - part * memory["activations"] for part in (1, 0.4))
    for remedy, room in (
        ("micro_batch_size=32", half),  # of 64
        ("activation_checkpointing=true or trainer=fsdp", state / 2),
    ):
        code, _, err = lab("plan", *run, f"gpu.memory={room / 0.8 + CONTEXT}")
        assert code == 1
        assert remedy in err
    lab.done("plan", *run, f"gpu.memory={half / 0.8 + CONTEXT}", "micro_batch_size=32")


@pytest.mark.slow
def test_compositions_stand_side_by_side(lab):
    gpus = ["gpu=a100,h100", "trainer=ddp,fsdp"]
    code, out, err = lab("plan", *SMALL, *gpus, "json=true")
    assert code == 0, err
    plans = json.loads(out.splitlines()[-1])["plans"]
    found = [(plan["gpu"]["name"][:4], plan["strategy"]) for plan in plans]
    assert found == [*product(("A100", "H100"), ("ddp", "fsdp"))]
    assert all(f"trainer={each}" in err for each in ("ddp", "fsdp"))
    assert lab("plan", *SMALL, *gpus, "gpu.memory=1000")[0] == 1  # none fits


@pytest.mark.slow
def test_an_equal_cost_is_planned(planned):
    reference = "budget.reference='backbone=mlp backbone.width=100'"
    plan = planned("backbone=mlp", *SMALL[2:], "budget=macs", reference, "mfu=0.4")
    assert plan["macs"] == pytest.approx(planned(*SMALL, "backbone.width=100")["macs"], rel=0.02)


@pytest.mark.slow
def test_numbers_of_devices_are_the_trainers_if_none_are_given(planned):
    for given, expected in (
        (["trainer.devices=2", "trainer.num_nodes=2"], (2, 2)),
        (["trainer.devices=[0,1,2,3]"], (4, 1)),
        (["trainer.devices=2", "devices=4", "nodes=2"], (4, 2)),
        ([], (8, 1)),
    ):
        plan = planned(*SMALL, *given)
        assert (plan["devices"], plan["nodes"]) == expected
        assert plan["micro_batch"] == 128 // math.prod(expected)


@pytest.mark.slow
def test_labels_that_are_numbers_are_planned(planned):
    source = ["data=absent", "data.source.image_shape=[1,8,8]", "data.source.num_classes=0"]
    facts = ["image_shape=[1,8,8]", *source, "conditioning=numeric_label"]
    one, many = (planned(*facts, f"data.source.label_size={size}") for size in (1, 20))
    assert one["memory"]["parameters"] < many["memory"]["parameters"]
