"""A simulated SLURM job of one task saves and requeues itself on a signal, then resumes."""

import os
import signal
from pathlib import Path

import pytest
from helpers.faults import Killed, at_step, die
from helpers.pairs import first_fast
from helpers.processes import SRUN
from helpers.refusals import assert_names
from helpers.tiny_runs import (
    EVALUATED,
    QUICK,
    TINY,
    checkpoint_of,
    rows,
    steps_of,
    summary_of,
    wandb_runs,
)

from diffusion_lab.compute import slurm
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.runs import load_config
from diffusion_lab.training.callbacks import Interruption, SampleGrid

ONE_TASK = {
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture
def job(environment, tmp_path, monkeypatch):
    """Acts as a job's only task; returns the file to which scontrol's arguments are written."""
    environment(SRUN | ONE_TASK)
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for program, line in (("scontrol", f'echo "$@" >> {calls}'), ("squeue", "echo RUNNING")):
        (programs / program).write_text(f"#!/bin/sh\n{line}\n")
        (programs / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return calls


def send(monkeypatch, number: int, step: int) -> None:
    """Sends a signal to this process in the step after `step`."""
    at_step(monkeypatch, step + 1, lambda: os.kill(os.getpid(), number))


def written() -> list[int]:
    """The times at which the checkpoints below this folder were written."""
    return [path.stat().st_mtime_ns for path in sorted(Path().glob("**/last.ckpt"))]


LOGGED = [*TINY, "name=x", "callbacks.evaluation=null", "trainer.max_steps=6"]
SHORT = [*QUICK, "name=x", "trainer.max_steps=6"]


@pytest.mark.long
@pytest.mark.parametrize(
    "number",
    first_fast([signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2]),
    ids=lambda number: number.name,
)
@pytest.mark.parametrize("where", first_fast([[], ["run_dir=mine"]]), ids=["named", "given"])
def test_a_signal_requeues_the_job_which_goes_on_in_the_same_folder(
    lab, tmp_path, monkeypatch, job, number, where
):
    with monkeypatch.context() as patched:
        send(patched, number, step=2)
        lab.done("train", *LOGGED, *where)
    assert job.read_text().split() == ["requeue", "17"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lab.done("train", *LOGGED, *where)
    (folder,) = [Path("mine")] if where else Path("outputs/x").iterdir()
    summary = summary_of(folder)
    assert (summary["finished"], summary["steps"]) == (True, 6)
    finished = written()
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]
    assert len(wandb_runs(folder)) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # by an administrator
    lab.done("train", *LOGGED, *where)
    assert job.read_text().split() == ["requeue", "17"]
    assert written() == finished


def test_a_job_of_an_array_requeues_itself_alone(monkeypatch, tmp_path, job):
    """The last job of an array has the array's id, for which squeue has a line per job."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    line = '[ "$2" = --jobs=17_2 ] && echo RUNNING || printf "RUNNING\\nPENDING\\n"'
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{line}\n")
    assert slurm.requeue() == ""
    assert job.read_text().split() == ["requeue", "17_2"]


def test_a_signal_in_the_last_evaluation_requeues_the_job(lab, tmp_path, monkeypatch, job):
    with monkeypatch.context() as patched:
        patched.setattr(SampleGrid, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        lab.done("train", *LOGGED, "logger=none")
    assert job.read_text().split() == ["requeue", "17"]


@pytest.mark.parametrize(
    ("program", "lines", "number", "named"),
    [
        ("squeue", "echo CANCELLED", signal.SIGTERM, "CANCELLED"),
        ("scontrol", "echo 'is no batch job' >&2\nexit 1", signal.SIGUSR1, "is no batch job"),
    ],
)
def test_a_job_that_is_not_requeued_is_saved_and_says_how_to_resume(
    lab, tmp_path, monkeypatch, job, program, lines, number, named
):
    (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{lines}\n")
    send(monkeypatch, number, step=2)
    err = lab.done("train", *SHORT, "run_dir=run", code=130)
    assert_names(err, named, "diffusion-lab train resume=run")
    assert not job.exists()


def test_a_job_that_died_before_its_first_checkpoint_begins_again_in_its_folder(
    lab, tmp_path, monkeypatch, job
):
    with monkeypatch.context() as patched:
        patched.setattr(DiffusionModule, "on_validation_epoch_start", lambda *_: die())
        with pytest.raises(Killed):
            lab("train", *SHORT)
    (folder,) = Path("outputs/x").iterdir()
    assert rows(folder)
    assert not (folder / "checkpoints").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lab.done("train", *SHORT)
    (same,) = Path("outputs/x").iterdir()
    assert same == folder
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_a_signal_in_an_evaluation_that_is_made_up_for_requeues_the_job_before_another_step(
    lab, tmp_path, monkeypatch, job
):
    line = [*EVALUATED, "callbacks.evaluation.every_n_steps=2", "metrics.num_samples=8"]
    line += ["callbacks.evaluation.batch_size=4", "name=x", "run_dir=mine", "trainer.max_steps=3"]
    asked = Interruption.asked

    def in_the_second_batch(self, trainer):
        self.votes = getattr(self, "votes", 0) + (trainer.global_step == 2)
        if self.votes == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return asked(self, trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "asked", in_the_second_batch)
        for restarts in ("0", "1"):
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            lab.done("train", *line)
            assert checkpoint_of(tmp_path / "mine")["global_step"] == 2
    assert job.read_text().split() == ["requeue", "17"] * 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    lab.done("train", *line)
    measured = [row["step"] for row in rows(Path("mine")) if any("fid" in name for name in row)]
    assert measured == [2, 3]


def seeds() -> list[tuple[int, bool]]:
    """The seeds of the runs, in the order in which they began, and whether they are finished."""
    folders = sorted(Path("outputs/x").iterdir())
    return [(load_config(each).seed, summary_of(each)["finished"]) for each in folders]


@pytest.mark.slow
def test_each_job_of_a_sweep_in_one_step_is_a_run_and_is_found_again(lab, monkeypatch, job):
    sweep = ["train", "-m", *SHORT, "seed=0,1"]
    with monkeypatch.context() as patched:
        send(patched, signal.SIGUSR1, step=2)
        lab(*sweep)  # the sweep's first job ends the process
    assert seeds() == [(0, False)]
    times = []
    for restarts in ("1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        lab.done(*sweep)
        assert seeds() == [(0, True), (1, True)]
        times.append(written())
    assert times[0] == times[1]


@pytest.mark.parametrize("variables", [{}, SRUN])
def test_the_signals_of_a_job_mean_nothing_outside_one(environment, variables):
    environment(variables)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with Interruption() as callback:
        callback.install()
        now = [signal.getsignal(number) for number in numbers]
    changed = [one != other for one, other in zip(before, now, strict=True)]
    assert changed == [True, bool(variables), bool(variables)]
    assert [signal.getsignal(number) for number in numbers] == before
