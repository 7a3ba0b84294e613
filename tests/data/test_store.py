"""Decoded images in a mapped file: the same images, order and resume, whatever happens to it."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.data_modules import data_of
from helpers.faults import killed_within
from helpers.paths import ROOT
from helpers.picture_files import archive, folder, numbered, png
from helpers.processes import exit_codes_of_three
from helpers.refusals import refused

from diffusion_lab.common.files import UNFINISHED
from diffusion_lab.data import DataError, store
from diffusion_lab.data.loader import TensorLoader
from diffusion_lab.data.source import ImageFolder, ImageZip, decoding, image_files
from diffusion_lab.data.store import StoredValues, stored

VALUES = torch.arange(24, dtype=torch.float32).reshape(6, 4)
KEY = {"of": "values"}


def computed(allocate) -> StoredValues:
    values = allocate((8, 4), torch.float32)
    assert not values.any()
    values[:6] = VALUES
    return StoredValues(values[:6], {"left_out": 2})


def never(allocate) -> StoredValues:
    raise AssertionError("computed again")


def read_only(path):
    raise PermissionError(errno.EACCES, "it is read-only")


def only(folder, pattern="*.bin"):
    (found,) = folder.glob(pattern)
    return found


def photos(tmp_path, store, **settings):
    root = tmp_path / "photos"
    if not root.exists():
        folder(root, numbered(40, "cat/{:02}.png") | numbered(40, "dog/{:02}.png"))
    where = {"store": store, "store_dir": str(tmp_path / "decoded")}
    return data_of(ImageFolder, str(root), **where, **settings)


class TestStored:
    def test_values_are_computed_once_and_then_mapped(self, tmp_path):
        first = stored(tmp_path / "new", "values", KEY, computed)
        again = stored(tmp_path / "new", "values", KEY, never)
        for values, facts in (first, again):
            assert torch.equal(values, VALUES)
            assert facts == {"left_out": 2}
        assert only(tmp_path / "new").read_bytes() == VALUES.numpy().tobytes()

    def test_another_key_is_another_file(self, tmp_path):
        stored(tmp_path, "values", KEY, computed)
        stored(tmp_path, "values", {"of": "others"}, computed)
        assert len(list(tmp_path.glob("values-*.bin"))) == 2

    @pytest.mark.parametrize("error", [ValueError("bad image"), KeyboardInterrupt()])
    def test_a_failure_leaves_no_store(self, tmp_path, error):
        def failing(allocate):
            computed(allocate)
            raise error

        with pytest.raises(type(error)):
            stored(tmp_path, "values", KEY, failing)
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
        assert torch.equal(stored(tmp_path, "values", KEY, computed).values, VALUES)

    @pytest.mark.parametrize("harm", ["short", "changed", "no JSON", "half a JSON", "no values"])
    def test_a_damaged_store_is_written_again(self, tmp_path, harm):
        stored(tmp_path, "values", KEY, computed)
        values, facts = only(tmp_path), only(tmp_path, "*.json")
        if harm == "short":
            os.truncate(values, 50)
        elif harm == "changed":
            with values.open("r+b") as file:
                file.write(b"\1")
        elif harm == "half a JSON":
            os.truncate(facts, 40)
        else:
            (facts if harm == "no JSON" else values).unlink()
        with pytest.raises(AssertionError, match="again"):
            stored(tmp_path, "values", KEY, never)
        assert torch.equal(stored(tmp_path, "values", KEY, computed).values, VALUES)

    def test_a_copied_store_is_checked_and_used(self, tmp_path):
        stored(tmp_path, "values", KEY, computed)
        os.utime(only(tmp_path), (1, 1))  # as cp leaves it
        assert torch.equal(stored(tmp_path, "values", KEY, never).values, VALUES)

    def test_a_read_only_folder_of_another_user_is_used(self, tmp_path, monkeypatch):
        stored(tmp_path, "values", KEY, computed)
        monkeypatch.setattr(store.files, "one_at_a_time", read_only)
        assert torch.equal(stored(tmp_path, "values", KEY, never).values, VALUES)

    def test_ranks_use_a_complete_store_that_they_cannot_write_to(self, tmp_path, monkeypatch):
        def rows(part: range, allocate) -> StoredValues:
            values = allocate((len(part), 4), torch.float32)
            values.copy_(VALUES[part.start : part.stop])
            return StoredValues(values, {})

        monkeypatch.setattr(store, "rank_and_world", lambda: (0, 2))
        whole = (tmp_path, "values", KEY, 6, 1)
        assert torch.equal(store.stored_by_ranks(*whole, rows).values, VALUES)
        assert len([*tmp_path.glob("*.bin")]) == 1
        monkeypatch.setattr(store.files, "one_at_a_time", read_only)
        assert torch.equal(store.stored_by_ranks(*whole, never).values, VALUES)

    @pytest.mark.parametrize("locks", [True, False])
    def test_partial_files_of_others_are_left_where_they_may_be_writing(
        self, tmp_path, monkeypatch, locks
    ):
        def no_locks(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        if not locks:
            monkeypatch.setattr("portalocker.portalocker.LOCKER", no_locks)
        stored(tmp_path, "values", KEY, computed)
        path = only(tmp_path)
        other = path.with_name(f".{path.name}.other{UNFINISHED}")
        other.touch()
        path.unlink()
        assert torch.equal(stored(tmp_path, "values", KEY, computed).values, VALUES)
        assert other.exists() != locks

    def test_a_process_that_is_killed_leaves_nothing_that_counts(self, tmp_path):
        def dying(allocate):
            computed(allocate)
            os.kill(os.getpid(), signal.SIGKILL)

        killed_within(lambda: stored(tmp_path, "values", KEY, dying))
        assert list(tmp_path.glob(".*.part"))
        assert torch.equal(stored(tmp_path, "values", KEY, computed).values, VALUES)
        assert not list(tmp_path.glob(".*.part"))

    def test_only_unfinished_files_of_the_same_name_are_removed(self, tmp_path):
        """A folder of images may have a name that is a pattern."""
        name = "photos[1]*"
        stored(tmp_path, name, KEY, computed)
        path = only(tmp_path)
        path.unlink()
        own = path.with_name(f".{path.name}.own{UNFINISHED}")
        other = path.with_name(f".{path.name.replace('[1]*', '1-of-others')}.other{UNFINISHED}")
        own.touch()
        other.touch()
        stored(tmp_path, name, KEY, computed)
        assert (own.exists(), other.exists()) == (False, True)

    @pytest.mark.long
    def test_processes_that_start_together_compute_once(self, tmp_path):
        def counted(allocate):
            with (tmp_path / "computed").open("a") as file:
                file.write("once ")
            time.sleep(0.3)
            return computed(allocate)

        def ask():
            assert torch.equal(stored(tmp_path, "values", KEY, counted).values, VALUES)

        assert exit_codes_of_three(ask) == [0, 0, 0]
        assert (tmp_path / "computed").read_text() == "once "


class TestImages:
    def test_they_are_those_in_memory_and_so_are_batches_from_any_step(self, tmp_path):
        settings = {"validation_size": 8, "fraction": 0.7, "flip": True, "pad": 6}
        kept, mapped = (photos(tmp_path, store, **settings) for store in (False, True))
        assert kept.fingerprint == mapped.fingerprint
        streams = [
            TensorLoader(
                data.reference_images(),
                data.reference_labels(),
                *(8, 3),
                flip=True,
                chosen=data.train_rows().places,
                pad=6,
                samples_seen=lambda: 5 * 8,  # a run that is resumed
            )
            for data in (kept, mapped)
        ]
        for ours, theirs in itertools.islice(zip(*streams, strict=True), 20):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.images.shape == (8, 1, 6, 6)
        for part in ("train_images", "test_images", "test_labels"):
            assert torch.equal(getattr(kept, part)(), getattr(mapped, part)())
        assert torch.equal(kept.validation_rows()[:], mapped.validation_rows()[:])
        assert len(list((tmp_path / "decoded").glob("photos-1x4x4-*.bin"))) == 2

    def test_they_are_not_decoded_again(self, tmp_path, monkeypatch):
        first = photos(tmp_path, True).fingerprint
        monkeypatch.setattr(image_files, "decode_into", None)
        assert photos(tmp_path, True).fingerprint == first

    @pytest.mark.parametrize("change", ["an image", "a label", "a setting"])
    def test_another_state_of_the_data_is_decoded_again(self, tmp_path, change):
        settings = {"resize": "crop", "image_size": 4}
        first = photos(tmp_path, True, **settings)
        before = first.fingerprint
        if change == "an image":
            (tmp_path / "photos/cat/03.png").write_bytes(png(200))
        elif change == "a label":
            (tmp_path / "photos/cat/03.png").rename(tmp_path / "photos/dog/99.png")
        else:
            settings["image_size"] = 5
        mapped, kept = (photos(tmp_path, store, **settings) for store in (True, False))
        assert mapped.fingerprint == kept.fingerprint != before
        del first.__dict__["fingerprint"]
        assert first.fingerprint == before  # the old file is still there

    def test_bad_images_are_left_out_of_the_file(self, tmp_path, capfd):
        contents = {f"{i:02}.png": i for i in range(40)} | {"05.png": b"bad", "17.png": b"bad"}
        path = archive(tmp_path / "a.zip", contents)
        where = {"store_dir": str(tmp_path / "decoded"), "on_bad": "skip"}
        read = [
            data_of(ImageZip, path, store=store, test_path=path, **where).train_images()
            for store in (False, True, True)
        ]
        assert read[0][:, 0, 0, 0].tolist() == [i for i in range(40) if i not in (5, 17)]
        assert torch.equal(read[0], read[1])
        assert torch.equal(read[1], read[2])
        assert capfd.readouterr().err.count("Skipped 2 of 40 images") == 6
        data = data_of(ImageZip, path, store=True, **where | {"on_bad": "refuse"})
        with refused("2 of", "05.png", "on_bad=skip", by=DataError):
            data.prepare_data()

    def test_what_the_system_could_not_read_is_read_again(self, tmp_path, monkeypatch):
        calls, read = itertools.count(), decoding.pixels

        def failing(*wanted):
            if next(calls) == 5:
                raise OSError(errno.EIO, "Input/output error")
            return read(*wanted)

        with monkeypatch.context() as patch:
            patch.setattr(decoding, "pixels", failing)
            with refused("Input/output error", by=DataError):
                photos(tmp_path, True, on_bad="skip").prepare_data()
        mapped, kept = (photos(tmp_path, store, on_bad="skip") for store in (True, False))
        assert torch.equal(mapped.train_images(), kept.train_images())

    @pytest.mark.parametrize(("limit", "files"), [(79 * 16, 2), (80 * 16, 0)])
    def test_auto_stores_what_is_large(self, tmp_path, monkeypatch, limit, files):
        monkeypatch.setattr(image_files, "LARGE", limit)
        photos(tmp_path, "auto").prepare_data()
        assert len(list((tmp_path / "decoded").glob("*.bin"))) == files

    def test_a_folder_that_cannot_take_them_is_one_sentence(self, tmp_path, monkeypatch):
        (tmp_path / "decoded").write_text("a file")
        with refused("store_dir=", "store=false", by=DataError):
            photos(tmp_path, True).prepare_data()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store.os, "posix_fallocate", full)
        (tmp_path / "decoded").unlink()
        with refused("No space left", "store=false", by=DataError):
            photos(tmp_path, True).prepare_data()
        assert not list((tmp_path / "decoded").glob(".*.part"))


SIDE = 256


@pytest.mark.slow
@pytest.mark.parametrize("count", [650, 20_400], ids=["128MB", "4GB"])
def test_images_in_a_file_are_no_memory_of_the_process(tmp_path, count):
    """A set of 4 GB is decoded, hashed, trained on and validated in under 100 MB more."""
    path = archive(tmp_path / "a.zip", {f"{i:06}.png": flat(i) for i in range(count)})
    test_path = archive(tmp_path / "b.zip", {f"{i}.png": flat(i) for i in range(2)})
    program = [sys.executable, "-m", "helpers.anonymous_memory", path, test_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    run = subprocess.run(
        [*program, str(tmp_path / "decoded")], env=environment, capture_output=True, text=True
    )
    for stored_file in (tmp_path / "decoded").glob("*.bin"):
        stored_file.unlink()  # pytest would keep it
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    pixels = 3 * SIDE**2
    assert found["bytes"] == count * pixels
    # each page was read: an image has one value, and each is trained on or kept for validation
    assert found["trained"] + found["validation"] == pixels * sum(i % 251 for i in range(count))
    assert found["validated_on"] == min(1000, count // 10)
    assert found["peak"] - found["start"] < min(100e6, 0.6 * found["bytes"])
    print({key: value / 1e6 for key, value in found.items() if key in ("bytes", "start", "peak")})


def flat(index: int) -> bytes:
    return png((index % 251,) * 3, (SIDE, SIDE))
