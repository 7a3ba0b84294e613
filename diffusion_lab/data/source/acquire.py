"""Acquisition of data sets: files are found, unpacked or downloaded, and verified before use."""

import gzip
import hashlib
import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, cast

from diffusion_lab.common.files import one_at_a_time
from diffusion_lab.common.messages import say

Fetch = Callable[[Path], Path]  # takes a scratch folder, returns one that may hold the files
# sha256 of the uncompressed files; compressed ones differ from one distributor to the next
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package puts its files
SILENCE_SECONDS = 10  # longest silence of a server
APT_SECONDS = 300  # enough for 31 MB over a slow line
LOCK = ".lock"  # in the folder of a data set
CHUNK, LARGEST = 2**20, 2**28  # bytes: read at once, and of a file of these data sets at most


class DataError(ValueError):
    """A data set's files are missing or damaged; the message says how to fix that."""


class SourceUnavailable(Exception):
    """A source cannot provide the files; the message says why, and the next source is tried."""


class Damaged(SourceUnavailable):
    """A file is truncated, no valid gzip file, or has the wrong checksum."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason})")


def fashion_mnist(root: Path) -> Path:
    """Returns the folder root/FashionMNIST/raw with the four idx files, each verified.

    Missing files come from `root` (plain idx files, also .gz), Debian's data folder, torchvision's
    mirror or Debian's package, in this order. Raises DataError.
    """
    raw = root / "FashionMNIST" / "raw"
    elsewhere: dict[str, Fetch] = {
        str(DEBIAN_FOLDER): lambda _: DEBIAN_FOLDER,
        "torchvision's mirror": _from_mirror,
        f"Debian's package {DEBIAN_PACKAGE}": _from_debian,
    }
    own = (raw, raw.parent, root, root / "fashion-mnist")
    wanted = "{} (plain or as .gz)"
    return complete("FashionMNIST", root, raw, FASHION_MNIST, lambda _: own, elsewhere, wanted)


def cifar10(root: Path) -> Path:
    """Returns the folder root/cifar-10-batches-py with torchvision's files, each verified.

    Missing files come from the archive in `root`, or else from its download. Raises DataError.
    """
    from torchvision import datasets

    source = datasets.CIFAR10
    files = dict([*source.train_list, *source.test_list])
    files[source.meta["filename"]] = source.meta["md5"]
    archive = root / source.filename

    def unpacked(scratch: Path) -> tuple[Path, ...]:
        if archive.is_file():
            check(archive, source.tgz_md5)
            (scratch / archive.name).symlink_to(archive.resolve())
            source(scratch, download=True)  # only unpacks, as the archive is there
        return (scratch / source.base_folder,)

    def downloaded(scratch: Path) -> Path:
        with network():
            source(scratch, download=True)
        return scratch / source.base_folder

    folder, elsewhere = root / source.base_folder, {source.url: downloaded}
    return complete("CIFAR-10", root, folder, files, unpacked, elsewhere, archive.name)


def complete(
    name: str,
    root: Path,
    folder: Path,
    files: Mapping[str, str],
    own: Callable[[Path], Sequence[Path]],
    elsewhere: Mapping[str, Fetch],
    wanted: str,
) -> Path:
    """Installs the `files` (name: checksum) that `folder` lacks, and returns the folder.

    They come from the user's `own` folders, where a damaged file is an error, or from `elsewhere`,
    a table of sources by name. `wanted` tells the user what to put into `root` if all fail.
    """
    try:
        if not missing(folder, files):
            return folder
        with workspace(folder) as scratch:
            say(f"{name}: looking in {root}")
            for place in own(scratch):
                _take(place, folder, files, scratch)
            reasons = []
            for source, fetch in elsewhere.items():
                if not missing(folder, files):
                    break
                say(f"{name}: looking in {source}")
                try:
                    _take(fetch(scratch), folder, files, scratch)
                except SourceUnavailable as error:
                    say(f"{name}: {error}")
                    reasons.append(f"{source}: {error}")
            lacking = missing(folder, files)
    except Damaged as error:
        raise DataError(f"{error}; delete it, and the next run will replace it") from error
    except OSError as error:
        raise DataError(
            f"root={root} cannot be read or written ({error}); fix that, or choose another folder"
        ) from error
    if lacking:
        raise DataError(
            f"{name} could not be fetched ({'; '.join(reasons)}): put "
            f"{wanted.format(' and '.join(lacking))} into {root}, or set root to a folder that "
            "contains the missing files"
        )
    say(f"{name}: complete in {folder}")
    return folder


def _take(source: Path, folder: Path, files: Mapping[str, str], scratch: Path) -> None:
    """Installs the missing files of `folder` from the folder `source`, where they may be .gz."""
    for name in missing(folder, files):
        for path in (source / name, source / f"{name}.gz"):
            if path.is_file():
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                    install(cast(IO[bytes], stream), path, folder / name, files[name], scratch)
                break


@contextmanager
def network() -> Iterator[None]:
    """Limits the silences of a torchvision download and turns its errors into SourceUnavailable."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        raise SourceUnavailable(_last_line(str(error))) from error
    finally:
        socket.setdefaulttimeout(before)


def _from_mirror(scratch: Path) -> Path:
    from torchvision import datasets

    with network():
        datasets.FashionMNIST(scratch, download=True)
    return scratch / "FashionMNIST" / "raw"


def _from_debian(scratch: Path) -> Path:
    """Downloads and unpacks Debian's package, without administrator rights."""
    run = partial(
        subprocess.run,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
        cwd=scratch,
        timeout=APT_SECONDS,
    )
    options = (f"-oAcquire::http::Timeout={SILENCE_SECONDS}", "-oAcquire::Retries=1")
    try:
        run(["apt-get", *options, "download", DEBIAN_PACKAGE])
        for package in scratch.glob("*.deb"):
            run(["dpkg", "-x", package.name, "."])
    except FileNotFoundError as error:
        raise SourceUnavailable(f"{error.filename} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"{error.cmd[0]} took more than {APT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        reason = _last_line(error.stderr)
        if "Unable to locate" in reason:
            reason += "; running `apt-get update` as root may fix this"
        raise SourceUnavailable(reason) from error
    return scratch / DEBIAN_FOLDER.relative_to("/")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder in `folder`, to one process at a time; removes empty folders."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with one_at_a_time(folder / LOCK):
        try:
            for leftover in folder.glob(".fetch-*"):  # left by a process that was killed
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                yield Path(scratch)
        finally:
            with suppress(OSError):  # Windows removes no open file, and no system a full folder
                if created and os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                for path in created:
                    path.rmdir()


def missing(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names the `files` (name: checksum) that `folder` lacks; a wrong file in it raises Damaged."""
    present = [name for name in files if (folder / name).is_file()]
    for name in present:
        check(folder / name, files[name])
    return [name for name in files if name not in present]


def check(path: Path, checksum: str, source: Path | None = None) -> None:
    """Raises Damaged, which names `source` if given, unless the file has this md5 or sha256."""
    method = "md5" if len(checksum) == 32 else "sha256"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(method, usedforsecurity=False))
    if digest.hexdigest() != checksum:
        raise Damaged(source or path, "its checksum is wrong")


def install(stream: IO[bytes], source: Path, target: Path, checksum: str, scratch: Path) -> None:
    """Copies `stream`, opened from the file `source`, to `target`, if it has this checksum.

    Raises Damaged, which names `source`, if not; `scratch` is a folder on `target`'s file system.
    """
    temporary = scratch / target.name
    try:
        with temporary.open("wb") as file:
            while chunk := stream.read(CHUNK):
                file.write(chunk)
                if file.tell() > LARGEST:
                    raise Damaged(source, f"it unpacks to more than {LARGEST:,} bytes")
    except EOFError as error:
        raise Damaged(source, "it is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(source, "it is not a valid gzip file") from error
    check(temporary, checksum, source)
    os.replace(temporary, target)
