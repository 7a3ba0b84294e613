"""The processes of commands on trained runs: one per device, or those that were started."""

import pytest
import torch
from helpers.processes import SRUN, TORCHRUN
from helpers.refusals import refused

from diffusion_lab.common import messages
from diffusion_lab.compute import launch
from diffusion_lab.compute.device import pick_device


def visible(monkeypatch, gpus: int) -> None:
    """Makes it seem as if this machine had so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("gpus", "asked", "count"),
    [
        (0, {}, 1),
        (0, {"devices": 3}, 3),
        (0, {"device": "cpu", "devices": 2}, 2),
        (2, {}, 2),
        (2, {"device": "cuda"}, 2),
        (2, {"devices": 1}, 1),
        (2, {"device": "cpu"}, 1),
        (2, {"device": "cuda:1"}, 1),
    ],
)
def test_a_command_takes_all_devices_or_as_many_as_are_asked_for(
    environment, monkeypatch, gpus, asked, count
):
    environment({})
    visible(monkeypatch, gpus)
    assert launch.processes_of_command(**{"device": "auto", "devices": "auto"} | asked) == count


def test_a_command_takes_what_was_started_and_each_process_a_device(environment, monkeypatch):
    visible(monkeypatch, 2)
    environment(SRUN)
    for devices in ("auto", 2):
        assert launch.processes_of_command("auto", devices) == 2
    assert str(pick_device("auto")) == str(pick_device("cuda")) == "cuda:1"
    assert str(pick_device("cuda:0")) == "cuda:0"
    assert str(pick_device("cpu")) == "cpu"
    environment({})
    assert str(pick_device("auto")) == "cuda"


@pytest.mark.parametrize(
    ("variables", "asked", "named"),
    [
        ({}, {"devices": 3}, ["devices=3", "2 GPUs"]),
        ({}, {"device": "cuda:1", "devices": 2}, ["device=cuda:1", "device=cuda"]),
        (SRUN, {"devices": 3}, ["devices=3", "2 on each node"]),
        (SRUN, {"device": "cuda:1"}, ["device=cuda:1", "device=cuda"]),
    ],
)
def test_devices_that_are_not_there_are_refused(environment, monkeypatch, variables, asked, named):
    environment(variables)
    visible(monkeypatch, 2)
    with refused(*named):
        launch.processes_of_command(**{"device": "auto", "devices": "auto"} | asked)


def test_processes_without_a_gpu_each_are_not_connected(environment, monkeypatch):
    environment(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"})
    visible(monkeypatch, 2)
    try:
        with refused("4 processes", "2 GPUs"):
            launch.join_process_group(torch.device("cuda", 1))
    finally:
        messages.speak(True)
