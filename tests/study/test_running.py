"""A study from nothing to its page, stopped and killed on the way, and tuned within its grid."""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from helpers.commands import prepare_for_commands
from helpers.refusals import assert_names
from helpers.started_study import ends, started, summaries, waits_for
from helpers.tiny_study import STUDY
from rich.console import Console

from diffusion_lab.cli.job import reply
from diffusion_lab.cli.study import document, running
from diffusion_lab.cli.study.choosing import best, beyond, result
from diffusion_lab.cli.study.cluster import JobOnSlurm
from diffusion_lab.cli.study.document import ARMS
from diffusion_lab.cli.study.jobs import Jobs, StudyJob, present
from diffusion_lab.cli.study.processes import Ended, Processes
from diffusion_lab.cli.study.running import Records, Schedule


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Starts `diffusion-lab study tiny` as a process in tmp_path, with changed keys."""
    prepare_for_commands(monkeypatch, tmp_path)
    (tmp_path / "conf/study").mkdir(parents=True)
    (tmp_path / "conf/study/tiny.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))

    return partial(started, "tiny", "--config-dir=conf")


@pytest.mark.long
def test_a_study_that_is_stopped_and_killed_ends_with_each_run_once_and_its_page(study):
    first = study()
    waits_for("tiny/tune/*/config.yaml")
    os.kill(first.pid, signal.SIGINT)
    code, said = ends(first)
    assert code == 130, said
    assert "study tiny" in said.splitlines()[-1]
    second = study()
    waits_for("tiny/train/*/checkpoints/last.ckpt")
    os.killpg(second.pid, signal.SIGKILL)
    ends(second)
    code, said = ends(study())
    assert code == 0, said
    runs = summaries("tiny")
    assert len(runs) == 2 + 4
    assert all(run["finished"] for run in runs.values())
    chosen = json.loads(Path("outputs/tiny/tune/tuning.json").read_text())["Wide"]["chosen"]
    for path in Path("outputs/tiny/train").glob("*/config.yaml"):
        cfg = yaml.safe_load(path.read_text())
        assert cfg["optimizer"]["lr"] == chosen["optimizer.lr"]
        assert cfg["arm"] == path.parent.name.split("_")[0]
    page = Path("outputs/tiny/page/index.html")
    *_, answer, last = said.splitlines()
    assert str(page) in last
    assert "fid" in answer.lower()
    assert {"Narrow", "Wide"} <= set(page.read_text().replace("<", " ").replace(">", " ").split())
    before = page.stat().st_mtime
    code, said = ends(study())
    assert (code, page.stat().st_mtime) == (0, before), said
    assert summaries("tiny") == runs, "nothing is done again"
    code, said = ends(study("lr_schedule=cosine"))
    assert code == 2, said
    assert_names(said, "lr_schedule", "tiny/tune/Wide_seed-100", "name=tiny_2")
    found = Path("outputs/tiny/tune/tuning.json").read_bytes()
    code, said = ends(study("budget.images=32"))
    assert code == 2, said
    assert_names(said, "images", "tiny/tune/", "name=tiny_2")
    assert Path("outputs/tiny/tune/tuning.json").read_bytes() == found


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Two processes at once for commands that print their arguments, and answer with them."""

    def execute(arguments: list[str]) -> None:
        print(*arguments, flush=True)
        reply(result=arguments)

    monkeypatch.setattr("diffusion_lab.cli.program.execute", execute)
    found = Processes(2, tmp_path, [])
    found.context = multiprocessing.get_context("fork")  # which has what is patched
    return found


def results(processes: Processes) -> dict[str, object]:
    """The results of all jobs by title, once they have ended."""
    found = {}
    while processes.running:
        found |= {each.job.title: each.result for each in processes.ended(60)}
    return found


def test_a_page_leaves_out_stages_of_which_no_run_has_begun(tmp_path, processes):
    there, gone = tmp_path / "train", tmp_path / "gone"
    there.mkdir()
    settings = {"output": "page"}
    processes.start(StudyJob("page", "compare", {}, "", settings, tmp_path, (), (there, gone)))
    assert results(processes) == {"page": ["compare", str(there), "output=page"]}
    assert present("study", ["tiny"]) == ["study", "tiny"]  # which is no folder


@pytest.mark.parametrize("code", [0, 2])
def test_what_ends_well_in_a_slurm_job_is_noted_as_done(tmp_path, monkeypatch, code):
    monkeypatch.setattr("diffusion_lab.cli.program.execute", lambda _: code and sys.exit(code))
    monkeypatch.chdir(tmp_path)
    records = Records(Jobs(document.load("backbones", {}, None), {}))
    (page,) = records.jobs.of("page")
    on_slurm = JobOnSlurm("compare", [], partial(records.note, page, result=None))
    with suppress(SystemExit):
        pickle.loads(pickle.dumps(on_slurm))()
    assert records.done(page) == (code == 0)


def test_trials_at_once_have_logs_and_results_of_their_own(tmp_path, processes):
    for rate in (1, 2):
        made = tmp_path / f"DiT_lr-{rate}"
        processes.start(StudyJob("tune", "train", {ARMS: "DiT"}, "DiT", {"lr": rate}, made))
    answers = [["train", "lr=1"], ["train", "lr=2"]]
    assert sorted(results(processes).values()) == answers
    logs = sorted(path.read_text() for path in tmp_path.glob("*.log"))
    assert logs == ["train lr=1\n", "train lr=2\n"]


def tried(**by_rate: float | None) -> list[dict]:
    """The results at learning rates, as in tried(r1=200.0) for 1e-3."""
    return [
        {"values": {"optimizer.lr": int(name[1:]) / 1000}, "results": {"100": value}}
        for name, value in by_rate.items()
    ]


def test_the_best_mean_wins_in_the_metrics_direction_and_a_diverged_run_never_does():
    assert best(tried(r1=3.0, r2=1.0, r4=2.0), "fid")["values"] == {"optimizer.lr": 2e-3}
    assert best(tried(r1=3.0, r2=1.0, r4=None), "accuracy")["values"] == {"optimizer.lr": 1e-3}
    assert best(tried(r1=None), "fid") is None


def test_a_grid_grows_beyond_the_end_that_wins():
    assert beyond(tried(r1=1.0, r2=2.0, r4=3.0), "fid") == [{"optimizer.lr": 5e-4}]
    assert beyond(tried(r1=3.0, r2=2.0, r4=1.0), "fid") == [{"optimizer.lr": 8e-3}]
    assert beyond(tried(r1=2.0, r2=1.0, r4=2.0), "fid") == []
    assert beyond(tried(r1=None, r2=None), "fid") == []
    assert beyond(tried(r0=2.0, r1=1.0), "fid") == []  # by which factor?
    signs = [{"values": {"shift": v}, "results": {"100": -v}} for v in (-4, 1, 2)]
    assert beyond(signs, "fid") == []  # 4 would have the folder of -4
    sizes = [{"values": {"batch_size": v}, "results": {"1": r}} for v, r in ((64, 2.0), (128, 1.0))]
    (grown,) = beyond(sizes, "fid")
    assert grown == {"batch_size": 256}
    assert type(grown["batch_size"]) is int


def job(stage: str, name: str, *needs: StudyJob) -> StudyJob:
    return StudyJob(stage, "train", {}, name, {}, Path(name), needs)


def test_a_job_can_run_once_those_that_it_needs_have_ended():
    one, two, free = job("start", "1"), job("start", "2"), job("other", "1")
    after, page = job("train", "1", one), job("page", "", two, free)
    schedule = Schedule([one, two, free, after, page], lambda each: iter([[each]]))
    assert [*schedule.ready()] == [one, two, free]
    schedule.ended(two)
    assert [*schedule.ready()] == []
    schedule.ended(one)
    assert [*schedule.ready()] == [after]
    schedule.ended(after)
    schedule.ended(free)
    assert [*schedule.ready()] == [page]
    assert schedule.lasts
    schedule.ended(page)
    assert [*schedule.ready()] == []
    assert not schedule.lasts


def test_trials_wait_for_the_ones_before_and_what_needs_the_best_for_all():
    best_rate, free = job("tune", ""), job("other", "1")
    first, second, measured = (job("tune", name) for name in ("a", "b", "c"))
    steps = {best_rate.title: [[first, second], [], [measured]]}
    after = job("train", "1", best_rate)
    jobs = [best_rate, free, after]
    schedule = Schedule(jobs, lambda each: iter(steps.get(each.title, [[each]])))
    assert [*schedule.ready()] == [first, second, free]
    schedule.ended(first)
    assert [*schedule.ready()] == []
    schedule.ended(second)
    assert [*schedule.ready()] == [measured]
    schedule.ended(measured)
    assert [*schedule.ready()] == [after]


MEASURED = {"stages.tune.measure": {"metrics.reference": "validation"}}


def jobs_of_tiny(folder: Path, changes: Mapping[str, object] = MappingProxyType({})) -> Jobs:
    """The jobs of the tiny study with changed keys, whose file this writes into a folder."""
    (folder / "study").mkdir()
    (folder / "study/tiny.yaml").write_text(yaml.safe_dump(STUDY))
    return Jobs(document.load("tiny", changes, str(folder)), {})


def test_random_values_that_come_again_are_tried_once(tmp_path):
    changes = {"stages.tune.trials": 8, "stages.tune.grow": 0}
    jobs = jobs_of_tiny(tmp_path, changes)
    (chooser,) = jobs.of("tune")
    titles = [trial.title for trial in jobs.first_of(chooser)]
    assert len(set(titles)) == len(titles) <= 2


def test_nothing_is_chosen_while_the_measurement_of_a_trial_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path, MEASURED))
    (chooser,) = records.jobs.of("tune")

    def chosen(runs: int) -> dict:
        """Names the choosers that fail where so many measurements end well."""
        runner = running.Runner(records, StubbornProcesses(), [chooser])
        for jobs in runner.tuning(chooser):
            for job in [each for each in jobs if each.command == "train"] or jobs[:runs]:
                job.made.mkdir(parents=True, exist_ok=True)
                if job.command == "train":
                    (job.made / "summary.json").write_text('{"finished": true}')
                else:
                    (job.made / "evaluations").mkdir(exist_ok=True)
                    (job.made / "evaluations/a.json").write_text('{"metrics": {"val/loss": 1.0}}')
                    records.note(job, 1.0, None)
        return dict(runner.failed)

    assert [*chosen(1)] == [chooser.title]
    assert not chooser.made.exists()
    assert chosen(2) == {}
    assert len(json.loads(chooser.made.read_text())[chooser.label]["tried"]) == 2


def test_a_choice_by_other_seeds_or_samples_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path, MEASURED))
    (chooser,) = records.jobs.of("tune")
    found = {"chosen": {"optimizer.lr": 1e-3}, **records.asked(chooser)}
    for changes in (
        {},
        {"seeds": [7]},
        {"num_samples": 9},
        {"images": 8},
        {"metric": "kid"},
        {"grow": 9},
    ):
        chooser.made.parent.mkdir(parents=True, exist_ok=True)
        chooser.made.write_text(json.dumps({chooser.label: found | changes}))
        assert records.done(chooser) is not bool(changes)


def test_a_grid_ends_where_a_value_beyond_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path, {"stages.tune.grow": 4}))
    (chooser,) = records.jobs.of("tune")
    runner, rates = running.Runner(records, StubbornProcesses(), [chooser]), []
    for trials in runner.tuning(chooser):
        for trial in trials:
            rates.append(trial.settings["optimizer.lr"])
            if rates[-1] > 4e-3:
                runner.note(Ended(trial, 2, "must be at most 0.004", None, 1.0))
                continue
            trial.made.mkdir(parents=True)
            record = {"finished": True, "metrics": {"val/loss": 1 - rates[-1]}}
            (trial.made / "summary.json").write_text(json.dumps(record))
    assert rates == [1e-3, 2e-3, 4e-3, 8e-3]
    assert runner.failed == {}
    chosen = json.loads(chooser.made.read_text())[chooser.label]["chosen"]
    assert chosen == {"optimizer.lr": 4e-3}


def test_a_training_with_values_that_are_no_longer_chosen_is_not_called_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path))
    (chooser,) = records.jobs.of("tune")
    run = next(job for job in records.jobs.of("train") if chooser in job.needs)
    run.made.mkdir(parents=True)
    (run.made / "summary.json").write_text('{"finished": true}')
    (run.made / "config.yaml").write_text("tuning: {chosen: {optimizer.lr: 0.001}}\n")
    chooser.made.parent.mkdir(parents=True)
    for rate in (1e-3, 2e-3):
        found = {"chosen": {"optimizer.lr": rate}, **records.asked(chooser)}
        chooser.made.write_text(json.dumps({chooser.label: found}))
        runner = running.Runner(records, StubbornProcesses(), [run])
        assert list(runner.steps(run)) == []
        assert [*runner.failed] == ([run.title] if rate == 2e-3 else [])


def test_a_trial_that_was_not_finished_has_no_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of_tiny(tmp_path)
    (chooser,) = jobs.of("tune")
    trial, choice = jobs.first_of(chooser)[0], jobs.study.stages["tune"].choice
    trial.made.mkdir(parents=True)
    for finished in (False, True):
        record = {"finished": finished, "metrics": {"val/loss": 0.5}}
        (trial.made / "summary.json").write_text(json.dumps(record))
        assert result(trial, choice.metric, None) == (0.5 if finished else None)
        later = {"val/loss/val5k": 0.4}
        assert result(trial, choice.metric, later) == (0.4 if finished else None)
        assert result(trial, choice.metric, {}) is None


def test_a_trial_is_judged_by_its_own_measurement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path, MEASURED))
    (chooser,) = records.jobs.of("tune")
    trial = records.jobs.first_of(chooser)[0]
    for place, fid in enumerate((30.0, 5.0)):
        file = trial.made / f"evaluations/{place}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"metrics": {"fid/val1k": fid}}))
        os.utime(file, (place, place))
    assert records.measured(trial) == {"fid/val1k": 5.0}  # on SLURM, which returns nothing
    records.note(records.jobs.measurement(trial), 1.0, {"fid/val1k": 20.0})
    assert records.measured(trial) == {"fid/val1k": 20.0}
    assert records.asked(chooser)["measure"] == MEASURED["stages.tune.measure"]


def test_runs_that_have_left_the_study_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of_tiny(tmp_path)
    (page,) = jobs.of("page")
    (folder,) = page.paths
    other = folder / "removed/config.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("")
    (page,) = Jobs(jobs.study, {}).of("page")
    assert {*page.paths} == {run.made for run in jobs.of("train")}


def test_a_measurement_that_met_no_finite_samples_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(jobs_of_tiny(tmp_path, MEASURED))
    trial = records.jobs.trials(records.jobs.of("tune")[0], {"optimizer.lr": 1e-3})[0]
    evaluation = records.jobs.measurement(trial)
    runner = running.Runner(records, StubbornProcesses(), [])
    for diverged in (False, True):
        runner.note(Ended(evaluation, 2, "samples are not finite", None, 1.0, diverged))
        assert records.done(evaluation) is diverged


def test_a_measurement_waits_for_earlier_comparisons_which_would_read_it():
    run = job("train", "1")
    page = replace(job("page", "", run), command="compare", paths=(Path("train"),))
    opinion = replace(job("opinion", "1", run), command="evaluate")
    schedule = Schedule([run, page, opinion], lambda each: iter([[each]]))
    assert [*schedule.ready()] == [run]
    schedule.ended(run)
    assert [*schedule.ready()] == [page]
    schedule.ended(page)
    assert [*schedule.ready()] == [opinion]


def test_a_job_that_is_done_runs_nothing_and_holds_nothing_up():
    done, after = job("train", "1"), job("page", "")
    schedule = Schedule([done, replace(after, needs=(done,))], lambda each: iter(()))
    assert [*schedule.ready()] == []
    assert not schedule.lasts


class StubbornProcesses:
    """Stands for processes of which each ends only when it is asked a second time."""

    def __init__(self):
        self.count, self.running, self.asked = 2, {}, 0

    @property
    def room(self):
        return len(self.running) < self.count

    def start(self, job):
        self.running[job.title] = (job, Path(), time.monotonic())

    def ended(self, seconds):
        self.asked += 1
        if self.asked % 2 == 0:
            job, *_ = self.running.pop(next(iter(self.running)))
            job.made.mkdir(parents=True)
            (job.made / "summary.json").write_text(
                '{"finished": true, "wall_seconds": 600, "images_seen": 16}'
            )
            yield Ended(job, 0, "", None, 600.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_says_how_far_a_study_is_while_its_jobs_run(tmp_path, monkeypatch, terminal):
    monkeypatch.chdir(tmp_path)
    shown = Console(file=StringIO(), force_terminal=terminal, width=200)
    monkeypatch.setattr(running, "console", shown)
    monkeypatch.setattr(running, "say", shown.print)
    monkeypatch.setattr(running, "BETWEEN_LINES", 0)
    records = Records(jobs_of_tiny(tmp_path))
    jobs = [replace(job, needs=()) for job in records.jobs.of("train")]
    whole = running.Runner(records, StubbornProcesses(), records.jobs.all)
    assert whole.progress() == "0 done, 0 running, 7 left"  # two trials and the page are counted
    running.Runner(records, StubbornProcesses(), jobs).run()
    lines = [each.split("Done")[0].strip() for each in shown.file.getvalue().splitlines()]
    said = " ".join(lines)
    assert "0 done, 2 running, 2 left" in said
    assert "2 done, 2 running, 0 left, about 10 min to go" in said
    assert whole.progress().startswith("4 done, 0 running, 3 left")
