"""Files that several processes write keep what each has added."""

from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Thread

from diffusion_lab.common import files
from diffusion_lab.common.files import read_json


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
