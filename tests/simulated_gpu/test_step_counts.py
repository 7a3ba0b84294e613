"""Operations, collectives and waits of one training step of each recipe are as stored.

golden/gpu_steps.txt holds them: a new copy to the device in a loss, or a broadcast that an update
of Lightning adds, is seen there. New and changed counts are written into it by

    STORE_COUNTS=1 make test-gpu GPU_TESTS_ON=simulated ARGS=tests/simulated_gpu/test_step_counts.py
"""

import os
import re
from pathlib import Path

import pytest
from helpers.gpu import only_simulated
from helpers.paths import TESTS
from helpers.tiny_runs import TINY

pytestmark = only_simulated
FILE = TESTS / "golden/gpu_steps.txt"
UNET = [
    *("backbone=unet_small", "backbone.channels=16", "backbone.multipliers=[1,2]"),
    "backbone.attention=[1]",
    *("data.source._target_=helpers.tiny_data.TinyData", "data.validation_size=20"),
    *("+debug=fast", "trainer.accelerator=gpu"),
]
COUNTED = [
    *("logger=none", "callbacks.evaluation=null", "callbacks.sample_grid=null"),
    *("trainer.log_every_n_steps=1000", "trainer.max_steps=6", "validate_every_n_steps=6"),
    *("+callbacks.counts._target_=helpers.simulated_gpu.step_counts.StepCounts",),
    "+callbacks.counts.file=counts",
]
RECIPES = {
    "dit": TINY,
    "dit-muon": [*TINY, "optimizer=muon"],
    "dit-fp32": [*TINY, "trainer.precision=32-true"],
    "dit-fp16": [*TINY, "trainer.precision=16-mixed"],
    "dit-two-micro-batches": [*TINY, "micro_batch_size=4"],
    "dit-images-on-cpu": [*TINY, "data.on_device=false"],
    "dit-flip": [*TINY, "data.flip=true"],
    "dit-time-limit": [*TINY, "trainer.max_time=00:01:00:00"],
    "dit-self-conditioning": [*TINY, "denoiser.self_conditioning=true"],
    "unet": UNET,
    "unet-muon": [*UNET, "optimizer=muon"],
    "edm2": [*UNET[4:], "backbone=edm2"],
    "improved-ddpm": [*TINY, "objective=improved_ddpm", "schedule=ddpm_linear"],
    "edm": [*TINY, "objective=edm", "schedule=edm"],
    "ect": [*TINY, "objective=ect", "schedule=edm"],
    "mean-flow": [*TINY, "objective=mean_flow"],
    "shortcut": [*TINY, "objective=shortcut"],
    "second-moment": [*TINY, "objective/time_sampler=second_moment"],
    "non-leaky": [*TINY, "augmentation=non_leaky"],
    "optimal-transport": [*TINY, "coupling=optimal_transport"],
    "uncertainty": [*TINY, "objective/loss/uncertainty=learned"],
}
ON_TWO = {
    "dit-ddp": [*TINY, "trainer=ddp"],
    "dit-ddp-two-micro-batches": [*TINY, "trainer=ddp", "micro_batch_size=2"],
    "dit-ddp-time-limit": [*TINY, "trainer=ddp", "trainer.max_time=00:01:00:00"],
    "dit-fsdp": [*TINY, "trainer=fsdp"],
    "second-moment-ddp": [*RECIPES["second-moment"], "trainer=ddp"],
}


def entries() -> dict[str, str]:
    """The stored counts by recipe."""
    parts = re.split(r"^== (\S+)\n", FILE.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def check(name: str, found: str) -> None:
    """Compares counts with the stored ones, or stores them."""
    stored = entries()
    if os.environ.get("STORE_COUNTS"):
        head = FILE.read_text().partition("\n==")[0].strip()
        names = [each for each in (*RECIPES, *ON_TWO) if each in stored | {name: found}]
        texts = (f"== {each}\n{(stored | {name: found})[each]}" for each in names)
        FILE.write_text("\n\n".join([head, *texts]) + "\n")
    else:
        assert found == stored.get(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_costs_what_is_stored(lab, name):
    lab.done("train", *RECIPES[name], *COUNTED, "run_dir=run")
    check(name, Path("counts0").read_text())


@pytest.mark.gpu(devices=2)
@pytest.mark.parametrize("name", ON_TWO)
def test_a_step_on_two_devices_costs_what_is_stored(lab, name):
    lab.done("train", *ON_TWO[name], *COUNTED, "trainer.devices=2", "run_dir=run")
    check(name, Path("counts0").read_text())
