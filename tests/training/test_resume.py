"""A resumed run has the rows and images of an unbroken one, one W&B run and one process."""

import errno
import os
import re
import shutil
import signal
import socket
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.faults import at_step, killed_within, no_file_above
from helpers.logged import ROWS, without_times
from helpers.pairs import first_fast
from helpers.paths import ROOT
from helpers.refusals import assert_names, refused
from helpers.seen_images import SEEN, seen
from helpers.tiny_data import TinyData
from helpers.tiny_runs import EVALUATED, QUICK, checkpoint_of, curve, rows, same, summary_of
from hydra.core.override_parser.overrides_parser import OverridesParser

from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.progress import is_locked, locked
from diffusion_lab.runs.summary import Summary, load_summary
from diffusion_lab.training.callbacks import Interruption, SampleGrid
from diffusion_lab.training.logger import Clock, JSONLines


def logged(folder):
    """The rows of a run without the times that were measured."""
    return list(map(without_times, rows(folder)))


@pytest.mark.long
@pytest.mark.parametrize("step", first_fast([4, 5, 6]))
def test_the_rows_of_a_killed_run_are_those_of_an_unbroken_one(
    lab, tmp_path, killed_at_step, trained_once, step
):
    whole = trained_once("train", *QUICK, *ROWS, "run_dir=run") / "run"
    killed_at_step(step, "train", *QUICK, *ROWS, "run_dir=parts")
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # cut short
    lab.done("train", "resume=parts")
    assert logged(tmp_path / "parts") == logged(whole)
    assert [row["step"] for row in logged(whole)] == [3, 4, 6, 8, 8]
    whole, parts = (checkpoint_of(folder) for folder in (whole, tmp_path / "parts"))
    assert str(whole["optimizer_states"]) == str(parts["optimizer_states"])
    for key in ("lr_schedulers", "callbacks"):
        assert whole[key] == parts[key], key


# a validation is due after step 4
@pytest.mark.parametrize(
    ("step", "number"),
    [(3, signal.SIGINT), pytest.param(4, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_the_rows_of_a_stopped_run_are_those_of_an_unbroken_one(
    lab, tmp_path, monkeypatch, trained_once, step, number
):
    whole = trained_once("train", *QUICK, *ROWS, "run_dir=run") / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        err = lab.done("train", *QUICK, *ROWS, "run_dir=parts", code=130)
    assert "diffusion-lab train resume=parts" in err
    summary = summary_of(tmp_path / "parts")
    assert (summary["finished"], summary["steps"]) == (False, step)
    assert checkpoint_of(tmp_path / "parts")["global_step"] == step
    stopped = [row for row in logged(whole) if row["step"] <= step]
    assert logged(tmp_path / "parts") == stopped
    lab.done("train", "resume=parts")
    assert logged(tmp_path / "parts") == logged(whole)


@pytest.mark.parametrize("number", first_fast([signal.SIGINT, signal.SIGTERM]))
def test_a_signal_in_the_last_evaluation_says_how_to_resume(lab, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(SampleGrid, "run", lambda *_: os.kill(os.getpid(), number))
        drawing = [each for each in QUICK if each != "callbacks.sample_grid=null"]
        err = lab.done("train", *drawing, "run_dir=run", code=130)
    assert_names(err, "step 4", "diffusion-lab train resume=run")
    assert summary_of(tmp_path / "run")["finished"] is False
    lab.done("train", "resume=run")
    assert list((tmp_path / "run/samples").glob("*.png"))


class Interrupting:
    """A file in whose second part Ctrl-C is pressed while it is written."""

    def __init__(self, file):
        self.file, self.parts = file, 0

    def write(self, content):
        self.parts += 1
        if self.parts == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(content)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize(("every", "said"), [(2, "diffusion-lab train resume=run"), (9, "again")])
def test_a_second_ctrl_c_while_a_checkpoint_is_written_says_how_to_go_on(
    lab, tmp_path, monkeypatch, every, said
):
    save, common = torch.save, [*QUICK, f"callbacks.checkpoint.every_n_steps={every}"]

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(torch, "save", lambda content, file: save(content, Interrupting(file)))

    at_step(monkeypatch, 3, interrupt)
    err = lab.done("train", *common, "run_dir=run", code=130)
    assert "Traceback" not in err
    assert said in err.splitlines()[-1]
    assert (tmp_path / "run/checkpoints/last.ckpt").exists() == (every == 2)


def test_a_run_does_not_go_on_with_other_images(refusal, run_folder, monkeypatch):
    def written():
        return {path: path.stat().st_mtime_ns for path in run_folder.rglob("*.*")}

    before, load = written(), TinyData.load

    def changed(self):
        train, test = load(self)
        return train._replace(labels=train.labels.flip(0)), test

    monkeypatch.setattr(TinyData, "load", changed)
    saved = load_config(run_folder).data_sha256
    assert saved[:12] in refusal("train", "resume=run", "trainer.max_steps=6")
    assert written() == before


def test_a_run_without_its_average_goes_on_from_the_trained_weights(lab, run_folder, monkeypatch):
    before = checkpoint_of(run_folder)
    trained, found = before["current_model_state"], {}
    assert not same(trained, before["state_dict"])
    original = DiffusionModule.training_step

    def look(self, batch, batch_idx):
        if not found:
            found.update({name: value.clone() for name, value in self.state_dict().items()})
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", look)
    without = ["callbacks.weight_averaging=null", "callbacks.evaluation=null"]
    lab.done("train", "resume=run", *without, "trainer.max_steps=5")
    assert all(torch.equal(found[name], value) for name, value in trained.items())


@pytest.mark.long
@pytest.mark.parametrize("micro", first_fast([("null", "2"), ("2", "null"), ("4", "1")]))
def test_another_micro_batch_sees_the_same_images(
    lab, tmp_path, killed_at_step, trained_once, micro
):
    common = [*QUICK, *SEEN, "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2"]
    whole = seen(trained_once("train", *common, "run_dir=run", "++callbacks.seen.folder=a") / "a")
    before, after = micro
    parts = ["run_dir=parts", "++callbacks.seen.folder=b", f"micro_batch_size={before}"]
    killed_at_step(4, "train", *common, *parts)
    # micro-batches now have another size
    lab.done("train", "resume=parts", f"micro_batch_size={after}", "++callbacks.seen.folder=c")
    first, second = (seen(tmp_path / folder) for folder in "bc")
    assert sorted(second) == [2, 3, 4, 5]
    assert {**first, **second} == whole
    assert summary_of(tmp_path / "parts")["steps"] == 6


@pytest.mark.slow
def test_other_numbers_of_ranks_see_the_same_images_in_the_same_order(lab, tmp_path):
    common = [*QUICK, *SEEN, "trainer.max_steps=9", "callbacks.checkpoint.every_n_steps=3"]
    lab.done("train", *common, "run_dir=whole", "++callbacks.seen.folder=whole_seen")
    common += ["micro_batch_size=4", "run_dir=parts"]
    first = ["++callbacks.seen.folder=a", "++callbacks.seen.die_at=4", "trainer.devices=2"]
    lab.done("train", *common, *first, code=2)
    second = ["++callbacks.seen.folder=b", "++callbacks.seen.die_at=7", "trainer.devices=1"]
    with refused("a test asked for", by=RuntimeError):
        lab("train", "resume=parts", *second)
    third = ["++callbacks.seen.folder=c", "++callbacks.seen.die_at=null", "trainer.devices=2"]
    lab.done("train", "resume=parts", *third)
    whole = seen(tmp_path / "whole_seen")
    parts = [seen(tmp_path / folder) for folder in "abc"]
    assert [sorted(part) for part in parts] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8]]
    for part in parts:
        for step, images in part.items():
            assert images == whole[step], step
    assert len({image for images in whole.values() for image in images}) == 64


def test_a_row_cut_short_and_later_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "seconds": 2.0}', '{"step": 3, "seconds": 5.0}']
    path.write_text("\n".join([kept[0], "", kept[1], '{"step": 4, "seconds": 6.0}', '{"st']))
    clock = Clock(8)
    JSONLines(path, clock).truncate(2)
    assert path.read_text().splitlines() == kept
    JSONLines(path, clock).truncate(0)
    assert path.read_text() == ""


def test_rows_that_cannot_be_written_come_with_a_later_one(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()  # acts as a folder without permission, as root has all permissions
    log = JSONLines(path, Clock(8))
    for step in (1, 2):
        log.log_metrics({"a": float(step)}, step)
    assert capfd.readouterr().err.count("metrics.jsonl") == 1
    path.rmdir()
    log.log_metrics({"a": 3.0}, 3)
    assert curve(tmp_path, "a") == [1, 2, 3]


def test_a_run_goes_on_without_its_log_file(lab, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, (tmp_path / "run/metrics.jsonl").mkdir)
    err = lab.done("train", *QUICK, "run_dir=run")
    assert_names(err, "metrics.jsonl", os.strerror(errno.EISDIR))


@pytest.mark.slow
def test_an_interrupted_run_is_offered_again(lab, tmp_path, killed_at_step):
    common = [*QUICK, "name=mine", "callbacks.checkpoint.every_n_steps=2"]
    killed_at_step(4, "train", *common)
    (folder,) = tmp_path.glob("outputs/mine/*")
    line = f"diffusion-lab train resume={folder.relative_to(tmp_path)}"
    with locked(folder):
        assert line not in lab.done("train", *common)
    assert line not in lab.done("train", *common, "run_dir=elsewhere")
    assert line in lab.done("train", *common)
    assert len(list(tmp_path.glob("outputs/mine/*"))) == 3
    assert not (folder / "summary.json").exists(), "nothing was started there"
    lab.done("train", f"resume={folder.relative_to(tmp_path)}")
    assert line not in lab.done("train", *common)


@pytest.mark.long
def test_a_run_that_is_made_longer_has_the_rates_of_its_new_length(lab, tmp_path):
    line = [*QUICK, "lr_schedule=cosine"]
    lab.done("train", *line, "trainer.max_steps=8", "run_dir=whole")
    lab.done("train", *line, "trainer.max_steps=4", "run_dir=run")
    lab.done("train", "resume=run", "trainer.max_steps=8")
    whole, run = (curve(tmp_path / each, "train/lr") for each in ("whole", "run"))
    assert run[4:] == whole[4:]
    assert run[4] > 0


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_is_made_longer_is_not_finished(
    lab, tmp_path, killed_at_step, trained_once
):
    shutil.copytree(trained_once("train", *QUICK, "run_dir=run"), tmp_path, dirs_exist_ok=True)
    before = load_summary(tmp_path / "run")
    killed_at_step(6, "train", "resume=run", "trainer.max_steps=8")
    assert load_summary(tmp_path / "run") == replace(before, finished=False)
    lab.done("train", "resume=run")
    summary = load_summary(tmp_path / "run")
    assert (summary.finished, summary.steps) == (True, 8)


def test_a_killed_run_is_not_made_shorter_than_it_is(refusal, run_folder):
    (run_folder / "summary.json").unlink()
    assert_names(refusal("train", "resume=run", "trainer.max_steps=2"), "step 4", "max_steps=2")


@pytest.mark.parametrize("content", [b'{"finished": tr', b"\xff\xfe", b"[1]", b""])
def test_a_damaged_summary_is_none(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    assert load_summary(tmp_path) == Summary()


def test_an_option_of_the_trainer_is_answered_with_what_to_write(refusal, run_folder):
    for option in ("cpu", "ddp", "fsdp"):
        sentence = refusal("train", "resume=run", "trainer.max_steps=9", f"trainer={option}")
        line = re.findall(r"trainer\.(\S+)", sentence)[-1]
        override = OverridesParser.create().parse_override(line)
        file = ROOT / f"conf/trainer/{option}.yaml"
        chosen = yaml.safe_load(file.read_text())[override.key_or_group]
        if isinstance(chosen, dict):  # its other keys have the values of the class
            chosen = {"_target_": chosen["_target_"]}
        assert chosen == override.value()


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_process_is_refused(refusal, run_folder, saved):
    before = (run_folder / "config.yaml").read_bytes()
    if not saved:
        shutil.rmtree(run_folder / "checkpoints")
    for devices in (1, 2):
        with locked(run_folder):
            assert is_locked(run_folder)
            longer = ["trainer.max_steps=9", f"trainer.devices={devices}"]
            sentence = refusal("train", "resume=run", *longer)
        assert_names(sentence, os.getpid(), socket.gethostname())
        assert "delete" not in sentence
    assert (run_folder / "config.yaml").read_bytes() == before
    assert not is_locked(run_folder)


def test_a_lock_ends_with_its_process(tmp_path):
    def act():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    killed_within(act)
    assert (tmp_path / ".lock").read_text().startswith("process")
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capfd):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("portalocker.portalocker.LOCKER", flock)
    with locked(tmp_path):
        pass
    assert_names(capfd.readouterr().err, tmp_path)


def test_a_run_without_room_for_its_lock_is_refused(tmp_path):
    with no_file_above(0), refused(tmp_path, os.strerror(errno.EFBIG)), locked(tmp_path):
        raise AssertionError
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("place", ["file/run", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_made_is_named(refusal, tmp_path, place):
    (tmp_path / "file").write_text("")
    sentence = refusal("train", *QUICK, f"run_dir={place}")
    assert place.removesuffix("/run") in sentence
    assert "run_dir=..." in sentence


@pytest.mark.long
def test_an_evaluation_that_is_stopped_is_made_when_the_run_is_resumed(lab, tmp_path, monkeypatch):
    line = [*EVALUATED, "callbacks.evaluation.every_n_steps=2", "metrics.num_samples=8"]
    line += ["callbacks.evaluation.batch_size=4", "metrics.reference=validation"]
    line += ["callbacks.checkpoint.best=fid", "callbacks.checkpoint.top_k=2"]
    lab.done("train", *line, "run_dir=whole")
    asked = Interruption.asked

    def in_the_second_batch(self, trainer):
        self.votes = getattr(self, "votes", 0) + (trainer.global_step == 2)
        self.requested |= self.votes == 2
        return asked(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", in_the_second_batch)
        lab.done("train", *line, "run_dir=parts", code=130)
    assert not any("fid" in name for row in logged(tmp_path / "parts") for name in row)
    lab.done("train", "resume=parts")
    measured = [
        {row["step"]: row for row in logged(tmp_path / run) if any("fid" in name for name in row)}
        for run in ("whole", "parts")
    ]
    assert measured[0].keys() == {2, 4}
    assert measured[0] == measured[1]
    ranked = [checkpoints.ranked(tmp_path / run) for run in ("whole", "parts")]
    assert ranked[0].keys() == {2, 4}
    assert ranked[0] == ranked[1]
    assert checkpoints.chosen(tmp_path / "parts", 2) is not None
