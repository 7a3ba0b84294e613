"""Processes that torchrun or srun has started are recognised and used as configured."""

import errno
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.faults import killed_within, no_file_above
from helpers.processes import SRUN, TORCHRUN
from helpers.refusals import refused
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import OmegaConf

from diffusion_lab.common import messages
from diffusion_lab.compute import launch, slurm, started
from diffusion_lab.compute.device import pick_device
from diffusion_lab.runs.folder import create
from diffusion_lab.training.callbacks import Interruption


def trainer(**values: object):
    defaults = {"accelerator": "cpu", "devices": "auto", "num_nodes": "auto"}
    return OmegaConf.create(defaults | values)


def test_without_a_launcher_what_is_asked_for_counts(environment):
    assert launch.processes(trainer()) == (1, 1)
    assert launch.processes(trainer(devices=3)) == (3, 1)
    assert launch.processes(trainer(devices=[0, 2], num_nodes=2)) == (2, 2)
    assert isinstance(launch.cluster(), LightningEnvironment)


@pytest.mark.parametrize("nodes", [0, "two", 1.5, True])
def test_nodes_are_a_whole_number(environment, nodes):
    with refused(f"trainer.num_nodes={nodes}"):
        launch.processes(trainer(num_nodes=nodes))


def test_what_srun_started_is_taken(environment, recwarn):
    environment(SRUN)
    assert launch.processes(trainer()) == (2, 2)
    assert launch.processes(trainer(devices=2, num_nodes=2)) == (2, 2)
    cluster = launch.cluster()
    assert isinstance(cluster, SLURMEnvironment)
    assert not cluster.auto_requeue
    assert (cluster.global_rank(), cluster.local_rank(), cluster.world_size()) == (3, 1, 4)
    assert cluster.main_address == "node3"
    cluster.validate_settings(2, 2)
    assert not recwarn


def test_what_torchrun_started_is_taken_also_within_a_job(environment):
    environment(SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"})
    assert launch.processes(trainer()) == (4, 2)
    assert isinstance(launch.cluster(), TorchElasticEnvironment)


@pytest.mark.parametrize(
    ("variables", "rank"),
    [({}, 0), (SRUN, 3), (SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, 5), (TORCHRUN, 0)],
)
def test_the_first_process_alone_speaks_before_there_is_a_group(
    environment, capfd, variables, rank
):
    environment(variables)
    assert started.rank() == rank
    try:
        started.let_rank_zero_speak()
        messages.say("said")
    finally:
        messages.console.quiet = False
    assert capfd.readouterr().err == ("" if rank else "said\n")


def test_other_numbers_than_were_started_are_refused(environment):
    environment(SRUN)
    for asked in ({"devices": 4}, {"num_nodes": 1}, {"devices": [0]}):
        with refused("trainer.devices", "trainer.num_nodes", "2 on each of 2 nodes"):
            launch.processes(trainer(**asked))
    environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"})
    with refused("2,1"):
        launch.processes(trainer())


@pytest.mark.parametrize(
    ("variables", "terminal", "task"),
    [
        ({}, False, True),
        ({}, True, True),  # srun --pty: its first task has a terminal
        ({"SLURM_STEP_NUM_TASKS": "1"}, True, False),  # srun --pty bash
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, True),
        ({"SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1"}, False, True),  # srun bash loop.sh
        ({"SLURM_STEP_ID": ""}, False, False),  # a batch script without srun
    ],
)
def test_a_task_of_srun_is_told_from_a_shell_and_a_script(
    environment, monkeypatch, variables, terminal, task
):
    environment(SRUN | variables)
    monkeypatch.setattr(slurm, "has_terminal", lambda: terminal)
    assert slurm.started_by_srun() == task
    assert slurm.step() == ("17.0" if task else None)
    assert slurm.tasks() == (int((SRUN | variables)["SLURM_STEP_NUM_TASKS"]) if task else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of the end of a parent")
def test_a_process_of_torchrun_ends_with_its_launcher(environment):
    environment(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"})
    reading, writing = os.pipe()

    def launch_and_die():
        if not os.fork():
            started.end_with_launcher()
            os.write(writing, b"started")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 7)
        os.kill(os.getpid(), signal.SIGKILL)

    killed_within(launch_and_die)
    os.close(writing)
    assert select.select([reading], [], [], 10)[0]
    assert os.read(reading, 1) == b""  # closed by the end of the last process that could write


def test_devices_are_asked_for_in_a_shell_of_srun(environment, monkeypatch):
    environment(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"})
    with refused("trainer.devices", "1 on each of 1 nodes"):
        launch.processes(trainer(devices=2))
    monkeypatch.setattr(slurm, "has_terminal", lambda: True)
    assert launch.processes(trainer(devices=2)) == (2, 1)
    assert isinstance(launch.cluster(), LightningEnvironment)


def test_whether_there_is_a_terminal_is_seen():
    asked = "import sys; from diffusion_lab.compute import slurm; sys.exit(slurm.has_terminal())"
    command = [sys.executable, "-c", asked]
    without = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    assert subprocess.run(command, check=False, **without).returncode == 0
    assert os.waitstatus_to_exitcode(pty.spawn(command)) == 1


def test_a_full_disk_is_said_where_a_job_signs_its_run(environment, tmp_path):
    environment(SRUN)
    cfg = OmegaConf.create({"name": "x", "logger": None, "run_dir": str(tmp_path / "run")})
    with no_file_above(0), refused("run/slurm_job", os.strerror(errno.EFBIG)):
        create(cfg, "train", [])


SEED = ["name=dit", "seed=1"]


def test_a_step_finds_the_run_that_it_signed_before_it_was_requeued(
    environment, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for stamp in ("1", "2", "3", "4"):
        (tmp_path / "outputs/dit" / stamp).mkdir(parents=True)
    slurm.sign(tmp_path / "outputs/dit/1", "train", SEED)
    assert not (tmp_path / "outputs/dit/1" / slurm.RECORD).exists()
    (tmp_path / "outputs/dit/4" / slurm.RECORD).write_text("17.0\n")
    requeued = SRUN | {"SLURM_RESTART_COUNT": "1"}
    environment(requeued)
    assert slurm.own_run("dit", None, "train", SEED) is None
    environment(SRUN)
    slurm.sign(tmp_path / "outputs/dit/2", "train", [*SEED, "logger.wandb.group=first"])
    environment(SRUN | {"SLURM_STEP_ID": "1"})
    slurm.sign(tmp_path / "outputs/dit/3", "train", SEED)
    environment(SRUN)
    assert slurm.own_run("dit", None, "train", SEED) is None  # a second run of the same step
    environment(requeued)
    for overrides in (SEED, [*SEED, "logger.wandb.group=second"]):
        assert str(slurm.own_run("dit", None, "train", overrides)) == "outputs/dit/2"
    for other in (
        ("dit", None, "train", ["name=dit", "seed=2"]),
        ("dit", None, "train-autoencoder", SEED),
        ("dit", "outputs/dit/3", "train", SEED),
        ("unet", None, "train", SEED),
    ):
        assert slurm.own_run(*other) is None
    for others in (requeued | {"SLURM_JOB_ID": "18"}, {}):
        environment(others)
        assert slurm.own_run("dit", None, "train", SEED) is None


def test_processes_that_are_asked_to_stop_get_the_time_to_save(monkeypatch):
    found = []
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(launch, "elastic_launch", lambda config, _: lambda *_: found.append(config))
    launch.run_on_all_devices("train", [], 2)
    (config,) = found
    assert config.shutdown_timeout == launch.SECONDS_TO_STOP_IN


@pytest.mark.parametrize("given", [None, "3"])
def test_the_environment_of_processes_is_not_left_in_this_one(monkeypatch, given):
    seen = []
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = dict(os.environ)
    monkeypatch.setattr(
        launch, "elastic_launch", lambda *_: lambda *_: seen.append(os.environ["OMP_NUM_THREADS"])
    )
    for processes in (2, 4):
        launch.run_on_all_devices("train", [], processes)
    assert seen == ([given] * 2 if given else ["4", "2"])
    assert dict(os.environ) == before


def test_ranks_vote_after_each_step_if_ten_take_long(monkeypatch):
    now, said = [0.0], []

    def vote(yes: bool, all: bool) -> bool:
        said.append(yes)
        return yes

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    callback = Interruption()
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=vote))
    due = []
    for step, seconds in enumerate([0.5] * 10 + [2.0] * 10 + [0.5] * 20, 1):
        now[0] += seconds
        trainer.global_step = step
        if callback._due(trainer):
            due.append(step)
    assert due == [10, 20, *range(21, 31), 40]
    assert said == [False, True, False, False]
    trainer.world_size = 1
    assert callback._due(trainer)


def test_ranks_stop_after_the_step_whose_evaluation_heard_of_it():
    other_rank = SimpleNamespace(reduce_boolean_decision=lambda yes, all: True)
    trainer = SimpleNamespace(
        world_size=2,
        global_step=3,
        strategy=other_rank,
        should_stop=False,
        accumulate_grad_batches=1,
        val_check_batch=None,
    )
    callback = Interruption()
    callback.on_train_batch_end(trainer, None, None, None, 2)
    assert not trainer.should_stop  # the ranks vote later
    assert callback.asked(trainer)
    callback.on_train_batch_end(trainer, None, None, None, 2)
    assert (trainer.should_stop, callback.requested) == (True, True)


@pytest.mark.parametrize(
    ("numbers", "stops"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGINT, signal.SIGTERM], True),  # as torchrun passes on a second Ctrl-C
        ([signal.SIGTERM, signal.SIGTERM], False),
    ],
)
def test_a_second_ctrl_c_stops_at_once(environment, numbers, stops):
    with Interruption() as callback:
        callback.install()
        for number in numbers[:-1]:
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
            os.kill(os.getpid(), numbers[-1])
        assert callback.requested


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
        messages.console.quiet = False
