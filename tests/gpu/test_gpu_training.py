"""Training on GPUs: precisions, layouts, compilation, resuming, several devices, and waiting."""

import itertools
import json
import math
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.faults import nan, spoil_loss
from helpers.gpu import DEVICE, TRAINER
from helpers.logged import by_step
from helpers.tiny_runs import TINY, same, summary_of

from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.data.loader import TensorLoader
from diffusion_lab.families.diffusion.module import DiffusionModule

pytestmark = pytest.mark.gpu
# steps that change what networks say, so that losses depend on their arithmetic
LEARNS = ["optimizer.lr=1e-2", "lr_schedule.warmup_images=0", "trainer.max_steps=8"]
QUIET = ["logger=none", "callbacks.evaluation=null", "callbacks.sample_grid=null"]
UNET = [
    *("backbone=unet_small", "backbone.channels=16", "backbone.multipliers=[1,2]"),
    "backbone.attention=[1]",
    *("data.source._target_=helpers.tiny_data.TinyData", "data.validation_size=20"),
    *("+debug=fast", TRAINER, *LEARNS),
]
ON = [*TINY, TRAINER, *LEARNS]


def loss_by_step(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """The logged losses of the steps that were taken."""
    return {step: row[name] for step, row in by_step(folder).items() if name in row}


def losses(folder: Path, name: str = "train/loss") -> list[float]:
    """The logged losses, by step."""
    return list(loss_by_step(folder, name).values())


def checkpoint(folder: Path) -> dict:
    """The last checkpoint of a run."""
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")


def trained(lab, folder: str, *arguments: str) -> Path:
    """The folder of a run, trained on the device."""
    lab.done("train", *arguments, f"run_dir={folder}")
    return Path(folder)


@pytest.mark.parametrize("network", [ON, UNET])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.05), ("16-mixed", 0.05)])
def test_half_precisions_train_as_float32_does(lab, network, precision, tolerance):
    whole = trained(lab, "whole", *network, *QUIET, "trainer.precision=32-true")
    half = trained(lab, "half", *network, *QUIET, f"trainer.precision={precision}")
    # float16's scaler may skip a step, from which on the weights differ
    skipped = loss_by_step(whole).keys() - loss_by_step(half)
    same = min(skipped, default=9) - 1
    assert same >= 5
    assert losses(whole)[:same] == pytest.approx(losses(half)[:same], rel=tolerance)
    assert losses(whole) != losses(half)
    dtypes = {weight.dtype for weight in checkpoint(half)["state_dict"].values()}
    assert torch.float32 in dtypes
    assert not dtypes & {torch.float16, torch.bfloat16}


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU fp16 has no scaler")
def test_the_scaler_of_fp16_is_saved_and_goes_on(lab):
    common = [*ON, *QUIET, "trainer.precision=16-mixed"]
    whole = trained(lab, "whole", *common, "trainer.max_steps=6")
    trained(lab, "parts", *common, "trainer.max_steps=3")
    lab.done("train", "resume=parts", "trainer.max_steps=6")
    scalers = [checkpoint(Path(each))["MixedPrecision"] for each in ("whole", "parts")]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] > 1
    assert losses(whole) == losses(Path("parts"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(lab, precision):
    common = [*UNET, *QUIET, f"trainer.precision={precision}", "trainer.deterministic=true"]
    whole = checkpoint(trained(lab, "whole", *common, "trainer.max_steps=6"))
    trained(lab, "parts", *common, "trainer.max_steps=3")
    lab.done("train", "resume=parts", "trainer.max_steps=6")
    parts = checkpoint(Path("parts"))
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, parts["state_dict"][name]), name


def test_a_run_goes_on_on_a_cpu_which_lays_out_kernels_in_another_way(lab):
    common = [*UNET, *QUIET, "optimizer.lr=1e-3", "trainer.precision=32-true"]
    whole = checkpoint(trained(lab, "whole", *common, "trainer.max_steps=6"))
    trained(lab, "parts", *common, "trainer.max_steps=4")
    lab.done("train", "resume=parts", "trainer.max_steps=6", "trainer.accelerator=cpu")
    parts = checkpoint(Path("parts"))
    for part in ("state_dict", "current_model_state"):
        for name, weight in whole[part].items():
            torch.testing.assert_close(weight, parts[part][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network", [ON, UNET])
def test_compiled_networks_train_as_others(lab, network):
    common = [*network, *QUIET, "trainer.precision=32-true"]
    runs = [
        trained(lab, f"compile-{choice}", *common, f"compile={choice}")
        for choice in ("false", "true")
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-3)


def test_layouts_train_alike(lab):
    common = [*UNET, *QUIET, "trainer.precision=32-true"]
    runs = [
        trained(lab, f"last-{choice}", *common, f"channels_last={choice}")
        for choice in ("false", "true")
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-3)


def test_samples_and_figures_are_those_of_a_cpu(lab, tmp_path):
    trained(lab, "run", *UNET, "logger=none", "trainer.precision=32-true")
    drawn, figures, near = [], [], []
    for device in ("cpu", DEVICE):
        common = ["run=run", f"device={device}", "precision=32-true", "json=true"]
        asked = ["num_samples=4", "save=npz", f"output={tmp_path / device}"]
        copies = ["num_samples=4", "control_images=5", f"output={tmp_path / device}"]
        commands = (["sample", *asked], ["evaluate"], ["memorization", *copies])
        for command, *own in commands:
            code, out, err = lab(command, *common, *own)
            assert code == 0, err
            result = json.loads(out.splitlines()[-1])
            if command == "sample":
                drawn.append(np.load(result["array"])["images"].astype(float))
            elif command == "evaluate":
                figures.append(result)
            else:
                near.append(result["neighbours"]["pixels"]["distance_ratio"])
    assert abs(drawn[0] - drawn[1]).mean() < 0.5  # grey levels
    assert figures[0] == pytest.approx(figures[1], rel=0.01)
    assert near[0] == pytest.approx(near[1], rel=0.01)


def test_noise_that_is_drawn_ahead_is_that_of_a_cpu(monkeypatch):
    drawn, threads = SampleNoise._drawn, []

    def watched(self, shape):
        threads.append(threading.current_thread() is threading.main_thread())
        return drawn(self, shape)

    here, there = SampleNoise(3, range(5)), SampleNoise(3, range(5), DEVICE)
    assert torch.equal(here((2, 4)), there((2, 4)).cpu())
    ours, theirs = here.randn_like, there.randn_like
    monkeypatch.setattr(SampleNoise, "_drawn", watched)
    x = torch.zeros(5, 3)
    made = [theirs(x.to(DEVICE)).cpu() for _ in range(4)]
    assert threads == ([True] * 4 if DEVICE == "cpu" else [False] * len(threads))
    assert all(torch.equal(ours(x), each) for each in made)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU nothing is moved")
@pytest.mark.parametrize("mirrored", [True, False])
def test_images_of_the_host_are_gathered_ahead_and_come_in_the_same_order(monkeypatch, mirrored):
    gathered, places = TensorLoader.gathered, []

    def watched(self, start, pinned=False):
        places.append((start, threading.current_thread() is threading.main_thread()))
        return gathered(self, start, pinned)

    monkeypatch.setattr(TensorLoader, "gathered", watched)
    images = torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8)
    common = {"images": images, "labels": torch.arange(50), "batch_size": 8, "seed": 3}
    common |= {"flip": True, "pad": None if mirrored else 8, "samples_seen": lambda: 24}
    common |= {"mirrored": images.flip(-1) if mirrored else None, "world": 2}
    here = [*itertools.islice(TensorLoader(**common), 20)]
    places.clear()
    stream = iter(TensorLoader(**common, device=DEVICE, on_device=False))
    there = [*itertools.islice(stream, 20)]
    stream.close()
    assert len(places) == 22
    assert not any(in_main for _, in_main in places)
    assert [start for start, _ in places] == [24 + 16 * i for i in range(22)]
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.images.device.type == DEVICE
        assert torch.equal(ours.images, theirs.images.cpu())
        assert torch.equal(ours.labels, theirs.labels.cpu())


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for")
def test_a_step_does_not_wait_for_the_gpu(lab, monkeypatch):
    step, found = DiffusionModule.optimizer_step, []

    def watched(self, *arguments, **named):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                return step(self, *arguments, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.append([str(each.message) for each in seen if "synchroniz" in str(each.message)])

    monkeypatch.setattr(DiffusionModule, "optimizer_step", watched)
    trained(lab, "run", *UNET, *QUIET, "trainer.precision=bf16-mixed", "trainer.max_steps=6")
    assert not any(found[2:])  # the first steps allocate


@pytest.mark.parametrize(
    "network",
    [
        [*UNET, "optimizer=adamw"],
        [*UNET, "optimizer=muon", "optimizer.weight_decay=0.1", "channels_last=true"],
        [*UNET, "optimizer.fused=false", "callbacks.weight_averaging.also=[100]"],
        [*UNET, "objective/time_sampler=second_moment"],
        [*UNET[4:], "backbone=edm2", "trainer.precision=32-true"],
    ],
)
def test_a_skipped_step_leaves_no_trace_and_is_counted(lab, monkeypatch, network):
    spoil_loss(monkeypatch, {3}, nan)
    kept = ["callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=3", *QUIET]
    folder = trained(lab, "run", *network, *kept, "trainer.log_every_n_steps=3")
    after = checkpoint(folder)
    before = torch.load(folder / "checkpoints/previous.ckpt", weights_only=True)
    assert (before["global_step"], after["global_step"]) == (2, 3)
    for part in ("state_dict", "current_model_state"):
        assert same(after[part], before[part]), part
    for half_life, average in before["averages"].items():
        assert same(after["averages"][half_life], average)
    for key, state in before["optimizer_states"][0]["state"].items():
        assert same(state, after["optimizer_states"][0]["state"][key])
    assert by_step(folder)[3]["train/skipped_steps"] == 1
    assert math.isfinite(by_step(folder)[3]["train/loss"])
    assert math.isfinite(by_step(folder)[3]["train/grad_norm_max"])
    assert summary_of(folder)["skipped_steps"] == 1


def test_a_row_of_bad_steps_is_found_where_rows_are_logged(lab, monkeypatch):
    spoil_loss(monkeypatch, range(3, 30), nan)
    asked = ["callbacks.non_finite.patience=3", "trainer.max_steps=30", *QUIET]
    code, _, err = lab("train", *UNET, *asked, "trainer.log_every_n_steps=6", "run_dir=run")
    assert code == 2
    found = re.search(r"in (\d+) consecutive steps, the last of them step (\d+)", err)
    # asked after step 6, the host knows of four, and looks at the fifth; a CPU looks at the third
    assert found.groups() == (("3", "5") if DEVICE == "cpu" else ("5", "7"))


@pytest.mark.gpu(devices=2)
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_devices_train_as_one(lab, trainer):
    common = [*TINY, *LEARNS, *QUIET, "trainer.precision=32-true"]
    one = trained(lab, "one", *common, TRAINER, "trainer.devices=1", "micro_batch_size=4")
    two = trained(lab, "two", *common, f"trainer={trainer}", TRAINER, "trainer.devices=2")
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    assert losses(one, "val/loss") == pytest.approx(losses(two, "val/loss"), rel=1e-4)
