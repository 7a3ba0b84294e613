"""Acquisition: every source, in order; damaged and partial files are never installed."""

import gzip
import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import exit_codes_of_three
from helpers.reduced import Reduced
from helpers.refusals import assert_names, refused
from torchvision import datasets

from diffusion_lab.data import DataError
from diffusion_lab.data.source import CIFAR10, FashionMNIST, acquire, known_sets
from diffusion_lab.data.source.acquire import SourceUnavailable


def idx(array: np.ndarray) -> bytes:
    """Writes an array in the idx format: magic number, sizes, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def contents() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 12), ("t10k", 4)):
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte"] = idx(pixels)
        files[f"{part}-labels-idx1-ubyte"] = idx(draw.integers(0, 10, count, dtype=np.uint8))
    return files


FILES = contents()
NAME = "train-images-idx3-ubyte"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves the files of a folder at the address that it yields."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def nowhere(scratch: Path) -> Path:
    raise SourceUnavailable("no network")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data root on a machine without network, apt and Debian's folder."""
    monkeypatch.setattr(
        acquire, "FASHION_MNIST", {n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}
    )
    monkeypatch.setattr(acquire, "DEBIAN_FOLDER", tmp_path / "usr" / "share")
    monkeypatch.setattr(acquire, "_from_mirror", nowhere)
    monkeypatch.setattr(acquire, "_from_debian", nowhere)
    return tmp_path / "data"


def put(folder: Path, gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        path = folder / (f"{name}.gz" if gz else name)
        path.write_bytes(gzip.compress(data) if gz else data)
    return folder


def everything_under(root: Path) -> set[str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in files if path.name != acquire.LOCK}


RAW = "FashionMNIST/raw"
INSTALLED = {f"{RAW}/{name}" for name in FILES}
DAMAGED = {
    "truncated": lambda data: data[: len(data) // 2],
    "changed": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "replaced": lambda _: b"<html>not found</html>",
    "another file": lambda _: gzip.compress(b"well formed"),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("folder", [RAW, "FashionMNIST", "", "fashion-mnist"])
def test_files_under_the_root_are_found(root, folder, gz):
    put(root / folder, gz)
    own = everything_under(root)
    acquire.fashion_mnist(root)
    assert everything_under(root) == own | INSTALLED  # the user's files stay
    images, labels = FashionMNIST(root=str(root)).load()[0]
    assert images.numpy().tobytes() == FILES[NAME][16:]
    assert labels.tolist() == list(FILES["train-labels-idx1-ubyte"][8:])


def test_complete_files_are_used_without_a_word(root, monkeypatch):
    put(root / RAW)
    monkeypatch.setattr(acquire, "say", pytest.fail)
    assert acquire.fashion_mnist(root) == root / RAW


@pytest.mark.parametrize("first", ["debian folder", "mirror", "apt"])
def test_the_first_source_that_can_serve_does(root, monkeypatch, first):
    served = []

    def serve(name, scratch):
        served.append(name)
        return put(scratch / name, gz=True)

    if first == "debian folder":
        put(acquire.DEBIAN_FOLDER, gz=True)
    if first in ("debian folder", "mirror"):
        monkeypatch.setattr(acquire, "_from_mirror", partial(serve, "mirror"))
    monkeypatch.setattr(acquire, "_from_debian", partial(serve, "apt"))
    acquire.fashion_mnist(root)
    assert everything_under(root) == INSTALLED
    assert served == ([] if first == "debian folder" else [first])


def test_only_what_lacks_is_fetched(root, monkeypatch):
    kept = put(root / RAW) / "t10k-labels-idx1-ubyte"
    (root / RAW / NAME).unlink()
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(acquire, "_from_mirror", lambda scratch: put(scratch / "x"))
    acquire.fashion_mnist(root)
    assert everything_under(root) == INSTALLED
    assert kept.stat().st_mtime_ns == before


def spoil(path: Path, how: str) -> None:
    path.write_bytes(DAMAGED[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("gz", [False, True])
def test_a_damaged_file_of_the_users_is_named_and_kept(root, monkeypatch, how, gz):
    path = put(root / RAW, gz) / (f"{NAME}.gz" if gz else NAME)
    spoil(path, how)
    data = path.read_bytes()
    monkeypatch.setattr(acquire, "_from_mirror", lambda _: pytest.fail("must not go on"))
    with refused(path, "delete it", by=DataError):
        FashionMNIST(root=str(root)).prepare()
    assert path.read_bytes() == data
    assert (root / RAW / NAME).exists() is not gz
    assert not list(root.rglob(".fetch-*"))


def test_a_gz_that_unpacks_without_end_is_refused_before_it_fills_the_disk(root, monkeypatch):
    path = put(root, gz=True) / f"{NAME}.gz"
    path.write_bytes(gzip.compress(bytes(2**21)))
    monkeypatch.setattr(acquire, "LARGEST", 2**20)
    with refused(path, "1,048,576", "delete it", by=DataError):
        acquire.fashion_mnist(root)


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_from_elsewhere_is_passed_over(root, monkeypatch, how):
    put(acquire.DEBIAN_FOLDER, gz=True)
    spoil(acquire.DEBIAN_FOLDER / f"{NAME}.gz", how)
    monkeypatch.setattr(acquire, "_from_mirror", lambda scratch: put(scratch / "x"))
    acquire.fashion_mnist(root)
    assert (root / RAW / NAME).read_bytes() == FILES[NAME]

    (root / RAW / NAME).unlink()
    monkeypatch.setattr(acquire, "_from_mirror", nowhere)
    with refused(f"{NAME}.gz", by=DataError):
        acquire.fashion_mnist(root)
    assert everything_under(root) == INSTALLED - {f"{RAW}/{NAME}"}


def test_a_failure_names_files_and_reasons_and_leaves_nothing(root, monkeypatch):
    def half(scratch: Path) -> Path:
        (scratch / f"{NAME}.gz").write_bytes(b"half")
        raise SourceUnavailable("the line went dead")

    monkeypatch.setattr(acquire, "_from_mirror", half)
    with pytest.raises(DataError) as caught:
        acquire.fashion_mnist(root)
    sentence = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    assert len(sentence) < 700
    assert_names(sentence, *FILES, "the line went dead", "no network", root)
    assert not root.exists()  # no root existed before, so none may be left


def test_an_interrupted_fetch_leaves_nothing(root, monkeypatch):
    def interrupted(scratch: Path) -> Path:
        (scratch / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(acquire, "_from_mirror", interrupted)
    root.mkdir()
    with pytest.raises(KeyboardInterrupt):
        acquire.fashion_mnist(root)
    assert list(root.iterdir()) == []


def test_what_a_killed_process_left_is_removed(root, monkeypatch):
    leftover = root / RAW / ".fetch-killed"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"half")
    put(acquire.DEBIAN_FOLDER)
    acquire.fashion_mnist(root)
    assert not leftover.exists()
    assert everything_under(root) == INSTALLED


def test_an_unusable_root_is_one_sentence(root):
    root.write_text("a file")
    with refused(f"root={root}", by=DataError):
        acquire.fashion_mnist(root)


@pytest.mark.long
def test_two_processes_fetch_once(root, monkeypatch, tmp_path):
    log = tmp_path / "log"

    def slow(scratch: Path) -> Path:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)
        return put(scratch / "x")

    monkeypatch.setattr(acquire, "_from_mirror", slow)
    assert exit_codes_of_three(partial(acquire.fashion_mnist, root)) == [0, 0, 0]
    assert log.read_text() == "fetched\n"
    assert everything_under(root) == INSTALLED


def test_processes_that_find_nothing_say_so_alike(root, monkeypatch):
    def unavailable(scratch: Path) -> Path:
        time.sleep(0.1)
        raise SourceUnavailable("no network")

    def fetch() -> None:
        with refused("no network", by=DataError):
            acquire.fashion_mnist(root)

    monkeypatch.setattr(acquire, "_from_mirror", unavailable)
    assert exit_codes_of_three(fetch) == [0, 0, 0]


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o700)


class TestDebianPackage:
    from_debian = staticmethod(acquire._from_debian)

    @pytest.fixture(autouse=True)
    def debian(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr(acquire, "_from_debian", self.from_debian)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def test_is_downloaded_and_unpacked(self, root, tmp_path):
        put(tmp_path / "package", gz=True)
        target = acquire.DEBIAN_FOLDER.relative_to("/")
        tool(tmp_path / "bin", "apt-get", f'echo "$@" > {tmp_path}/asked; echo > set.deb')
        unpack = f"mkdir -p $3/{target}; cp {tmp_path}/package/* $3/{target}"
        tool(tmp_path / "bin", "dpkg", unpack)
        acquire.fashion_mnist(root)
        assert everything_under(root) == INSTALLED
        assert (tmp_path / "asked").read_text().endswith("download dataset-fashion-mnist\n")

    def test_empty_package_lists_give_the_hint(self, root, tmp_path):
        complaint = "E: Unable to locate package dataset-fashion-mnist"
        tool(tmp_path / "bin", "apt-get", f'echo W: noise >&2; echo "{complaint}" >&2; exit 100')
        with refused(complaint, "`apt-get update`", by=DataError):
            acquire.fashion_mnist(root)

    def test_a_system_without_apt_says_so(self, root, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        with refused("apt-get is not installed", by=DataError):
            acquire.fashion_mnist(root)

    def test_a_hanging_apt_is_stopped(self, root, monkeypatch, tmp_path):
        monkeypatch.setattr(acquire, "APT_SECONDS", 0.2)
        tool(tmp_path / "bin", "apt-get", "exec sleep 30")
        start = time.monotonic()
        with refused("apt-get", "0.2 s", by=DataError):
            acquire.fashion_mnist(root)
        assert time.monotonic() - start < 5


class TestMirror:
    from_mirror = staticmethod(acquire._from_mirror)

    @pytest.fixture(autouse=True)
    def mirror(self, root, monkeypatch):
        monkeypatch.setattr(acquire, "_from_mirror", self.from_mirror)

    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """The folder of a local mirror."""
        folder = put(tmp_path / "mirror", gz=True)
        sums = [
            (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in folder.iterdir()
        ]
        monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
        with serving(folder) as address:
            monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
            yield folder

    def test_serves(self, root, served):
        acquire.fashion_mnist(root)
        assert everything_under(root) == INSTALLED
        assert socket.getdefaulttimeout() is None

    @pytest.mark.parametrize("how", ["truncated", "changed", "replaced"])
    def test_a_bad_download_is_not_kept(self, root, served, how):
        spoil(served / f"{NAME}.gz", how)
        with refused("mirror: ", by=DataError):
            acquire.fashion_mnist(root)
        assert not root.exists()

    def test_a_silent_server_is_given_up(self, root, monkeypatch):
        monkeypatch.setattr(acquire, "SILENCE_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"http://127.0.0.1:{server.getsockname()[1]}/"
            monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
            threading.Timer(6, server.close).start()  # so that a failing test ends, too
            start = time.monotonic()
            with refused("mirror: ", "timed out", by=DataError):
                acquire.fashion_mnist(root)
        assert time.monotonic() - start < 5
        assert socket.getdefaulttimeout() is None


def pixels(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """A data root with a tiny cifar-10-python.tar.gz, and no network."""
    batches = {
        f"data_batch_{i}": {"data": pixels(i, 4), "labels": [i, 9, 0, 1]} for i in range(1, 6)
    }
    batches["test_batch"] = {"data": pixels(6, 3), "labels": [2, 3, 4]}
    batches["batches.meta"] = {"label_names": list(CIFAR10.class_names)}
    files = {name: pickle.dumps(batch) for name, batch in batches.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = datasets.CIFAR10
    archive = (root / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(source, "train_list", [[n, md5[n]] for n in files if "data" in n])
    monkeypatch.setattr(source, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return root


def test_cifar_is_unpacked_and_read(cifar):
    (images, labels), (test_images, test_labels) = CIFAR10(root=str(cifar)).load()
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [label for i in range(1, 6) for label in (i, 9, 0, 1)]
    assert torch.equal(images[4:8], torch.from_numpy(pixels(2, 4)).view(-1, 3, 32, 32))
    assert torch.equal(test_images, torch.from_numpy(pixels(6, 3)).view(-1, 3, 32, 32))
    assert test_labels.tolist() == [2, 3, 4]
    assert len(everything_under(cifar)) == 8  # the archive and its seven files
    (cifar / "cifar-10-python.tar.gz").unlink()
    acquire.cifar10(cifar)  # needs nothing more


@pytest.mark.parametrize("how", ["truncated", "changed", "replaced"])
def test_a_damaged_cifar_archive_is_named(cifar, how):
    spoil(cifar / "cifar-10-python.tar.gz", how)
    with refused("cifar-10-python.tar.gz", "delete it", by=DataError):
        acquire.cifar10(cifar)
    assert everything_under(cifar) == {"cifar-10-python.tar.gz"}
    assert not (cifar / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_cifar_batch_is_named_and_not_unpickled(cifar, tmp_path, name):
    acquire.cifar10(cifar)
    bomb = pickle.dumps(Reduced(os.mkdir, tmp_path / "unpickled"))
    (cifar / "cifar-10-batches-py" / name).write_bytes(bomb)
    with refused(name, "delete it", by=DataError):
        CIFAR10(root=str(cifar)).load()
    assert not (tmp_path / "unpickled").exists()


def test_cifar_out_of_reach_says_what_to_do(cifar, capsys):
    (cifar / "cifar-10-python.tar.gz").unlink()
    with refused("put cifar-10-python.tar.gz", cifar, by=DataError):
        CIFAR10(root=str(cifar)).prepare()
    assert list(cifar.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Iterator[Path]:
    """A zip as GitHub makes it of a repository with a few JPEG files in folders of classes."""
    path = tmp_path / "served" / "repository.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images-abc/README.md", "no image")
        for split, count in (("train", 3), ("test", 2)):
            for kind in ("airplane", "truck"):
                for i in range(count):
                    name = f"images-abc/{split}/{kind}/{i:04}.jpg"
                    archive.writestr(name, f"{split} {kind} {i}")
    packed = {}
    with zipfile.ZipFile(path) as archive:
        for split in ("train", "test"):
            name = f"cifar10-{split}.zip"
            known_sets.pack(archive, split, tmp_path / name)
            packed[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(known_sets, "ZIPS", packed)
    with serving(path.parent) as address:
        monkeypatch.setattr(known_sets, "ARCHIVE", f"{address}{path.name}")
        yield path


def test_cifar_zips_are_packed_in_the_order_of_a_hash_of_their_names(repository, tmp_path):
    root = tmp_path / "root"
    assert known_sets.zips(root) == root
    assert everything_under(root) == {"cifar10-train.zip", "cifar10-test.zip"}
    with zipfile.ZipFile(root / "cifar10-test.zip") as packed:
        names = ["test/airplane/0000.jpg", "test/airplane/0001.jpg"]
        names += ["test/truck/0000.jpg", "test/truck/0001.jpg"]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        members = [f"00000/img{i:08}.jpg" for i in range(4)]
        assert packed.namelist() == [*members, "dataset.json"]
        labels = json.loads(packed.read("dataset.json"))["labels"]
        numbers = [int("truck" in name) for name in names]
        assert labels == [list(pair) for pair in zip(members, numbers, strict=True)]
        for member, name in zip(members, names, strict=True):
            split, kind, number = name.removesuffix(".jpg").split("/")
            assert packed.read(member).decode() == f"{split} {kind} {int(number)}"
        assert {info.date_time for info in packed.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    repository.unlink()
    known_sets.zips(root)  # needs nothing more


def test_cifar_zips_out_of_reach_and_damaged_ones_are_named(repository, tmp_path):
    repository.unlink()
    with refused("cifar10-train.zip and cifar10-test.zip", tmp_path, by=DataError):
        known_sets.zips(tmp_path / "root")
    spoil(tmp_path / "cifar10-test.zip", "changed")
    with refused("cifar10-test.zip", "delete it", by=DataError):
        known_sets.zips(tmp_path)
