"""Checkpoints: the previous one is kept, damage is found, faults always leave a whole one."""

import errno
import os
import random
import resource
import signal
import zipfile
from pathlib import Path
from shutil import copytree

import pytest
import torch
from helpers.commands import run_alone
from helpers.faults import killed_within
from helpers.refusals import assert_names, refused, sentence_of
from helpers.tiny_runs import ALONE, QUICK, TINY, same

from diffusion_lab.common.files import UNFINISHED, replacing, write_atomically
from diffusion_lab.runs import checkpoints, current
from diffusion_lab.training.callbacks import Checkpoint

EVERY_STEP = [*QUICK, "callbacks.checkpoint.every_n_steps=1", "run_dir=run"]


def state(number):
    return {"state_dict": {"w": torch.full((500,), float(number))}, "global_step": number}


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture
def two(tmp_path):
    """A run folder whose last checkpoint is of step 2 and the one before it of step 1."""
    for number in (1, 2):
        checkpoints.save(state(number), tmp_path / checkpoints.LAST)
    return tmp_path


def test_the_one_before_is_kept_without_hard_links_too(two, monkeypatch):
    assert step_of(two / checkpoints.LAST) == 2
    assert step_of(two / checkpoints.PREVIOUS) == 1
    assert len(list((two / checkpoints.FOLDER).iterdir())) == 2
    assert checkpoints.newest_intact(two) == two / checkpoints.LAST

    def link(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    checkpoints.save(state(3), two / checkpoints.LAST)
    assert step_of(two / checkpoints.LAST) == 3
    assert step_of(two / checkpoints.PREVIOUS) == 2


def test_a_save_that_fails_changes_nothing(two, small_files):
    big = state(3) | {"more": torch.zeros(100_000)}
    with pytest.raises(OSError) as caught:  # noqa: PT011, its number tells
        checkpoints.save(big, two / checkpoints.LAST)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(two / checkpoints.LAST)
    assert step_of(two / checkpoints.LAST) == 2
    assert step_of(two / checkpoints.PREVIOUS) == 1
    assert len(list((two / checkpoints.FOLDER).iterdir())) == 2


def test_any_changed_bit_is_harmless_or_seen(tmp_path):
    path = tmp_path / checkpoints.LAST
    checkpoints.save(state(7), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    seen = 0
    # zip headers are between the parts and at the end, so flip bits everywhere
    for place in draw.sample(range(len(whole)), 400):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if checkpoints.fault(path):
            seen += 1
        else:
            loaded = torch.load(path, weights_only=True)
            assert torch.equal(loaded["state_dict"]["w"], state(7)["state_dict"]["w"]), place
            assert loaded["global_step"] == 7
    assert seen > 200


@pytest.mark.parametrize("length", [0, 1, 1000, -1])
def test_a_truncated_last_checkpoint_is_replaced_by_the_one_before(two, capfd, length):
    last = two / checkpoints.LAST
    last.write_bytes(last.read_bytes()[:length])
    path = checkpoints.newest_intact(two)
    assert path == two / checkpoints.PREVIOUS
    checkpoints.say_if_older(two, path)
    assert "last.ckpt" in capfd.readouterr().err


def test_a_last_checkpoint_that_is_missing_is_said_to_be(two, capfd):
    (two / checkpoints.LAST).unlink()  # as a kill between two renames does without hard links
    assert checkpoints.resume_from(two) == two / checkpoints.PREVIOUS
    err = capfd.readouterr().err
    assert_names(err, "last.ckpt", "previous.ckpt")
    assert "damaged" not in err


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_just_now_is_left_where_it_is(two, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(zipfile, "ZipFile", fail)
        with refused("last.ckpt", os.strerror(number)):
            checkpoints.resume_from(two)
    assert checkpoints.resume_from(two) == two / checkpoints.LAST


def test_without_a_whole_one_both_are_named(two):
    for path in (two / checkpoints.LAST, two / checkpoints.PREVIOUS):
        with zipfile.ZipFile(path) as archive:
            offset = archive.infolist()[0].header_offset + 100
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
    with refused("last.ckpt", "previous.ckpt"):
        checkpoints.newest_intact(two)


W = {"w": torch.zeros(2)}
FOREIGN = {
    "weights alone": W,
    "a tensor": torch.zeros(2),
    "text": "weights",
    "a list": [W, 1],
    "weights without a step": {"state_dict": W},
    "a step without weights": {"global_step": 1},
    "a step that is a tensor": {"state_dict": W, "global_step": torch.tensor(1)},
    "a step that is text": {"state_dict": W, "global_step": "1"},
    "a list of weights": {"state_dict": [W], "global_step": 1},
    "numbers in place of weights": {"state_dict": {"w": 1.0}, "global_step": 1},
    "names that are numbers": {"state_dict": {1: torch.zeros(2)}, "global_step": 1},
    "trained weights": state(1) | {checkpoints.TRAINED: torch.zeros(2)},
    "averages without names": state(1) | {checkpoints.AVERAGES: [W]},
    "averages": state(1) | {checkpoints.AVERAGES: {"500": 1}},
    "a snapshot": state(1) | {checkpoints.SNAPSHOT: {"w": None}},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_torch_that_is_no_checkpoint_is_told_from_a_damaged_one(two, content):
    torch.save(content, two / checkpoints.LAST)
    assert checkpoints.newest_intact(two) == two / checkpoints.PREVIOUS
    torch.save(content, two / checkpoints.PREVIOUS)
    with refused("last.ckpt is not a checkpoint", "previous.ckpt is not a checkpoint"):
        checkpoints.newest_intact(two)


@pytest.mark.long
@pytest.mark.parametrize("line", ["sample run=run", "train resume=run trainer.max_steps=9"])
def test_weights_alone_in_place_of_a_checkpoint_are_one_sentence(refusal, run_folder, line):
    path = run_folder / checkpoints.LAST
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)
    (run_folder / checkpoints.PREVIOUS).unlink(missing_ok=True)
    assert "last.ckpt is not a checkpoint" in refusal(*line.split())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: state(4),
        lambda content: content | {"loops": "none"},
        lambda content: content | state(4),  # of another network
    ],
)
def test_a_checkpoint_that_does_not_fit_its_run_is_one_sentence(refusal, run_folder, change):
    path = run_folder / checkpoints.LAST
    torch.save(change(torch.load(path, weights_only=True)), path)
    sentence = refusal("train", "resume=run", "trainer.max_steps=9")
    assert "last.ckpt does not fit this run" in sentence


def test_going_on_puts_the_damaged_one_aside_and_removes_what_is_unfinished(two):
    (two / checkpoints.LAST).write_bytes(b"half")
    for folder in (two, two / checkpoints.FOLDER):
        (folder / f".x.{'0' * 32}{UNFINISHED}").write_bytes(b"half")
    (two / "samples").mkdir()
    for name in (f".step_0000002.png.{'0' * 32}{UNFINISHED}", f".mine.png.x{UNFINISHED}"):
        (two / "samples" / name).write_bytes(b"half")
    assert checkpoints.resume_from(two) == two / checkpoints.PREVIOUS
    assert {path.name for path in two.iterdir()} == {"checkpoints", "samples"}
    # a file that `sample` may be writing stays
    assert [path.name for path in (two / "samples").iterdir()] == [f".mine.png.x{UNFINISHED}"]
    names = {path.name for path in (two / checkpoints.FOLDER).iterdir()}
    assert names == {"previous.ckpt", "damaged.ckpt"}
    checkpoints.save(state(3), two / checkpoints.LAST)  # keeps the whole one
    assert step_of(two / checkpoints.PREVIOUS) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail():
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path, monkeypatch):
    def half(_, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save(state(1), tmp_path / checkpoints.LAST)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        killed_within(lambda: checkpoints.save(state(2), tmp_path / checkpoints.LAST))
    assert len(list((tmp_path / checkpoints.FOLDER).iterdir())) == 2  # one is unfinished
    assert step_of(checkpoints.resume_from(tmp_path)) == 1
    assert [path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()] == ["last.ckpt"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(lab, tmp_path):
    lab.done("train", *EVERY_STEP)
    folder = tmp_path / "run"
    whole = torch.load(folder / checkpoints.LAST, weights_only=True)
    assert step_of(folder / checkpoints.PREVIOUS) == 3
    last = folder / checkpoints.LAST
    last.write_bytes(last.read_bytes()[:-1000])

    err = lab.done("sample", "run=run", "num_samples=4")
    assert err.count("last.ckpt") == err.count("previous.ckpt") == 1
    (folder / "summary.json").unlink()  # as after a kill
    assert_names(lab.done("train", "resume=run"), "last.ckpt")
    again = torch.load(last, weights_only=True)
    assert same(again["current_model_state"], whole["current_model_state"])
    assert (folder / checkpoints.DAMAGED).exists()
    assert step_of(folder / checkpoints.PREVIOUS) == 3


def test_a_full_disk_is_survived_until_the_end_and_then_said(lab, tmp_path, small_files):
    err = lab.done("train", *EVERY_STEP, code=2)
    assert_names(sentence_of(err), "step 4")
    assert_names(err, "step 1", "step 2", "step 3", os.strerror(errno.EFBIG))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(lab, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Checkpoint.run

    def run(self, trainer):
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        original(self, trainer)

    monkeypatch.setattr(Checkpoint, "run", run)
    try:
        code, _, err = lab("train", *EVERY_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "diffusion-lab train resume=run" in sentence_of(err)
    assert step_of(checkpoints.newest_intact(tmp_path / "run")) == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    lab.done("train", "resume=run")
    assert step_of(tmp_path / "run" / checkpoints.LAST) == 4


def test_fingerprints_are_of_the_file_that_is_used(two):
    first = current.sha256_of(two)
    (two / checkpoints.LAST).write_bytes(b"half")
    assert current.sha256_of(two) != first


MEASURED = ["metrics.num_samples=20", "metrics.reference_size=20"]
COMMANDS = {
    "resume": ["train", "resume=run", "trainer.max_steps=5"],
    "start": ["train", *TINY, *ALONE, "init_from=run", "run_dir=new", "trainer.max_steps=2"],
    "sample": ["sample", "run=run", "num_samples=2"],
    "sample-step": ["sample", "run=run", "num_samples=2", "step=4"],
    "average": ["average", "run=run"],
    "evaluate": ["evaluate", "run=run", *MEASURED],
    "sample-sweep": ["sample-sweep", "run=run", "steps=2", *MEASURED],
    "memorization": ["memorization", "run=run", "num_samples=4"],
    "likelihood": ["likelihood", "run=run", "num_images=4"],
    "encode": ["encode", "run=run"],
    "inpaint": ["inpaint", "run=run"],
    "profile": ["profile", "run=run"],
    "export": ["export", "run=run", "output=shared"],
}


@pytest.fixture(scope="module")
def from_gpu(tmp_path_factory) -> Path:
    """The folder of a run with files as a GPU writes them."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run_alone(
            folder,
            *("train", *TINY, *ALONE, "trainer.max_steps=4", "run_dir=run"),
            *("callbacks.posthoc_ema.snapshots=2", "callbacks.checkpoint.keep_every_n_steps=4"),
        )
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return folder


SLOW = ("memorization", "profile")
CASES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS]


@pytest.mark.parametrize("name", CASES)
def test_every_command_opens_them(lab, from_gpu, tmp_path, name):
    copytree(from_gpu, tmp_path, dirs_exist_ok=True)
    lab.done(*COMMANDS[name])
