"""Files that several processes write, places that cannot be written to, and full disks."""

import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

import pytest
from helpers.refusals import refused
from rich.console import Console

from diffusion_lab.common import files, messages
from diffusion_lab.common.files import read_json, require_writable, write_atomically


def test_who_waited_for_a_lock_that_was_removed_takes_the_new_one(tmp_path):
    path, inside, most = tmp_path / "new/.lock", [], []

    def work() -> None:
        with files.one_at_a_time(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
            path.unlink()
            path.parent.rmdir()

    workers = [Thread(target=work) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert most == [1, 1, 1, 1]


@pytest.mark.long
def test_what_is_added_at_the_same_time_is_all_kept(tmp_path, monkeypatch):
    file, both = tmp_path / "tuning.json", Barrier(2)

    def read_slowly(path):
        found = read_json(path)
        with suppress(BrokenBarrierError):
            both.wait(timeout=0.5)  # without a lock both read before one of them writes
        return found

    monkeypatch.setattr(files, "read_json", read_slowly)
    adding = [Thread(target=files.add_to_json, args=(file, {name: 1})) for name in ("a", "b")]
    for each in adding:
        each.start()
    for each in adding:
        each.join()
    assert read_json(file) == {"a": 1, "b": 1}


def test_lines_on_a_full_disk_are_lost_and_work_goes_on(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(messages, "console", Console(file=full))
        messages.say("lost")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # which can be closed


def test_a_place_that_cannot_be_written_to_is_named_and_what_else_to_do(tmp_path):
    require_writable("output", str(tmp_path / "new/folder"), "go elsewhere")
    assert list(tmp_path.iterdir()) == []
    with refused("output=/proc/nowhere/x", "make /proc writable", "go elsewhere"):
        require_writable("output", "/proc/nowhere/x", "go elsewhere")


def test_the_error_of_a_read_only_place_names_the_file_that_was_wanted(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # as on a file system that is mounted so
    with pytest.raises(PermissionError) as caught:
        write_atomically(tmp_path / "x", "content")
    assert caught.value.filename == str(tmp_path / "x")
