"""The command `status`: the state of each run by its folder, its sweep and SLURM's queue."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.fake_runs import fake_run
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY

from diffusion_lab.analysis import status
from diffusion_lab.analysis.publishing import publish
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.runs import sweep_record
from diffusion_lab.runs.progress import locked
from diffusion_lab.runs.sweep_record import Job

STUDY = Path("outputs/mine")
UNFINISHED = {"finished": False, "steps": 40}
LENGTH = {"trainer": {"max_steps": 200, "max_time": None}, "batch_size": 64}
SWEEP = Path("outputs/multirun/2026-01-01_00-00-00_1")


@pytest.fixture
def shown(lab):
    """Runs `status`; returns the rows by the last part of their names, and all that is printed."""

    def show(*arguments):
        code, out, err = lab("status", *arguments, "json=true")
        assert code == 0, err
        result = json.loads(out.splitlines()[-1])
        rows = {Path(row["run"]).name: row for row in result["runs"]}
        assert sum(result["counts"].values()) == len(rows)
        return rows, err

    return show


@pytest.fixture
def states(shown):
    def states_of(*arguments):
        return {name: row["state"] for name, row in shown(*arguments)[0].items()}

    return states_of


def unfinished(folder: Path, stopped: bool = True, **config) -> Path:
    """Writes a run that has logged step 100 of 200, and was stopped or killed at that step."""
    fake_run(folder, 100.0, config=LENGTH | config, summary=UNFINISHED)
    (folder / ".lock").touch()
    later = (folder / "summary.json").stat().st_mtime + 1
    os.utime(folder / ("summary.json" if stopped else "config.yaml"), (later, later))
    return folder


def swept(*names: str, slurm: tuple[str, ...] = (), study: str | None = "mine") -> Path:
    """Writes the record of a sweep with a job for each of the runs, as its command does."""
    jobs = [
        Job([f"run={name}"], Path("outputs") / study / name if study else None) for name in names
    ]
    SWEEP.mkdir(parents=True)
    sweep_record.write(SWEEP, study, jobs)
    sweep_record.add_slurm_jobs(SWEEP, study, 0, slurm)
    return SWEEP


def log_of(job: str) -> Path:
    path = SWEEP / f".submitit/{job}/{job}_0_log.out"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_the_state_of_a_run_is_read_from_its_folder(lab, states):
    fake_run(STUDY / "finished", 100.0)
    for name in ("running", "failed", "stopped"):
        unfinished(STUDY / name)
    unfinished(STUDY / "tuning/killed", stopped=False)
    (STUDY / "failed/error.txt").write_text("the disk is full\n")
    (STUDY / ".abandoned").mkdir()
    unfinished(STUDY / ".abandoned/old")
    with locked(STUDY / "running"):
        assert states() == {
            name: name for name in ("finished", "running", "failed", "stopped", "killed")
        }
    assert states("outputs/mine/failed") == {"failed": "failed"}
    assert states("outputs/mine/tuning", "outputs/mine/running") == {
        "killed": "killed",
        "running": "stopped",
    }


@pytest.mark.parametrize(
    ("limit", "max_steps", "left"),
    [
        (None, 200, 100 * 64 / 400),
        ("00:00:05:00", 200, 100 * 64 / 400),
        ("00:00:01:50", None, 110 - 100),
        ("00:00:01:00", None, 0),
        ({"minutes": 1}, None, 0),
        ("110 s", None, 110 - 100),
        ("0.05h", 200, 100 * 64 / 400),
    ],
)
def test_steps_speed_and_what_is_left_follow_from_the_last_rows(shown, limit, max_steps, left):
    run = unfinished(STUDY / "a", trainer={"max_steps": 200, "max_time": limit})
    with locked(run):
        row = shown()[0]["a"]
    assert (row["step"], row["max_steps"], row["images_per_second"]) == (100, max_steps, 400)
    assert row["seconds_left"] == pytest.approx(left)
    row = shown()[0]["a"]
    assert (row["state"], row["step"]) == ("stopped", 100)
    assert (row["images_per_second"], row["seconds_left"]) == (None, None)


def test_a_run_that_has_logged_nothing_is_at_its_beginning(shown):
    run = unfinished(STUDY / "a")
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").unlink()
    with locked(run):
        row = shown()[0]["a"]
    assert (row["state"], row["step"], row["max_steps"]) == ("running", 0, 200)
    assert (row["images_per_second"], row["seconds_left"]) == (None, None)


def test_jobs_that_wait_for_their_turn_are_queued_while_the_sweep_lives(states):
    fake_run(STUDY / "first", 100.0)
    unfinished(STUDY / "second")
    unfinished(STUDY / "third")
    sweep = swept("first", "second", "third", "fourth")
    with locked(sweep), locked(STUDY / "second"):
        expected = {"first": "finished", "second": "running"}
        assert states() == expected | {"third": "queued", "fourth": "queued"}
    expected = {"first": "finished", "second": "stopped", "third": "stopped"}
    assert states() == expected | {"fourth": "not started"}
    assert states("outputs/mine/third") == {"third": "stopped"}


def test_a_job_that_failed_gives_its_reason_until_its_run_is_resumed(shown):
    sweep = swept("refused", "begun", "gone")
    run = unfinished(STUDY / "begun")
    for number in range(2):
        sweep_record.note(sweep, number, sweep_record.FAILED, [], error=f"reason {number}")
    sweep_record.note(sweep, 2, sweep_record.DONE, [])
    rows, err = shown()
    assert {name: (row["state"], row["reason"]) for name, row in rows.items()} == {
        "refused": ("failed", "reason 0"),
        "begun": ("failed", "reason 1"),
    }
    assert_names(err, "reason 0", "reason 1", "2 failed")
    later = (run / "config.yaml").stat().st_mtime + 100
    for name in ("config.yaml", "summary.json"):
        os.utime(run / name, (later, later + (name == "summary.json")))
    assert shown()[0]["begun"]["state"] == "stopped"


def test_jobs_of_slurm_are_what_squeue_says_unless_their_run_has_ended(shown, fake_slurm):
    fake_run(STUDY / "finished", 100.0)
    unfinished(STUDY / "again")
    unfinished(STUDY / "dead", stopped=False)
    names = ["finished", "again", "begins", "waits", "dead", "cancelled", "crashed"]
    swept(*names, slurm=tuple(f"17_{number}" for number in range(7)))
    log = log_of("17_6")
    fake_slurm.says(
        "17_0|COMPLETING|None",
        "17_1|PENDING|BeginTime",
        "17_2|RUNNING|None",
        "17_3|PENDING|Resources",
        "17_4|NODE_FAIL|None",
        "17_5|CANCELLED|None",
    )
    rows, err = shown()
    assert {name: (row["state"], row["job"]) for name, row in rows.items()} == {
        "finished": ("finished", "17_0"),
        "again": ("queued", "17_1"),
        "begins": ("running", "17_2"),
        "waits": ("queued", "17_3"),
        "dead": ("killed", "17_4"),
        "cancelled": ("not started", "17_5"),
        "crashed": ("failed", "17_6"),
    }
    assert (rows["again"]["reason"], rows["waits"]["reason"]) == ("BeginTime", "Resources")
    assert "NODE_FAIL" in rows["dead"]["reason"]
    assert rows["crashed"]["log"] == str(log)
    assert str(log) in err


def test_a_queue_that_does_not_answer_is_no_statement_about_jobs(shown, fake_slurm):
    fake_run(STUDY / "finished", 100.0)
    swept("finished", "sent", slurm=("17_0", "17_1"))
    fake_slurm.is_silent()
    rows, err = shown()
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "finished",
        "sent": "unknown",
    }
    assert "Unable to contact" in err


def test_jobs_without_a_study_are_listed_until_their_runs_begin(shown, fake_slurm):
    swept("one", "two", slurm=("17_0", "17_1"), study=None)
    begun = unfinished(Path("outputs/net/2026-01-01_00-00-00"))
    (begun / "slurm_job").write_text(json.dumps({"job": "17_0"}))
    fake_slurm.says("17_0|RUNNING|None", "17_1|PENDING|Priority")
    rows, _ = shown()
    assert {name: (row["state"], row["job"]) for name, row in rows.items()} == {
        "2026-01-01_00-00-00": ("running", "17_0"),
        "run=two": ("queued", "17_1"),
    }


def test_a_study_is_read_where_it_was_moved_to(states, tmp_path):
    fake_run(STUDY / "first", 100.0)
    swept("first", "second")
    STUDY.parent.rename(tmp_path / "elsewhere")
    assert states("elsewhere/mine") == {"first": "finished", "second": "not started"}


def test_published_copies_in_a_study_are_no_runs_of_it(states):
    fake_run(STUDY / "train/first", 100.0)
    publish([str(STUDY / "train")], str(STUDY / "record"))
    assert states() == {"first": "finished"}


def test_watching_ends_when_no_run_is_open(lab, monkeypatch):
    run, waited = unfinished(STUDY / "a"), []
    with ExitStack() as stack:
        stack.enter_context(locked(run))

        def sleep(seconds):
            waited.append(seconds)
            if len(waited) == 2:
                stack.close()

        monkeypatch.setattr(status.time, "sleep", sleep)
        lab.done("status", "watch=7")
    assert waited == [7, 7]


@pytest.mark.long
def test_the_reason_of_a_failure_stays_until_the_run_is_resumed(lab, shown, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nat address 0")

    quick = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
    with monkeypatch.context() as patched:
        patched.setattr(DiffusionModule, "on_validation_epoch_start", fail)
        with pytest.raises(RuntimeError):
            lab("train", *quick, "run_dir=outputs/a", "callbacks.checkpoint.every_n_steps=1")
    row = shown()[0]["a"]
    assert (row["state"], row["reason"]) == ("failed", "RuntimeError: out of memory")
    lab.done("train", "resume=outputs/a")
    assert shown()[0]["a"]["state"] == "finished"
    assert not Path("outputs/a/error.txt").exists()
