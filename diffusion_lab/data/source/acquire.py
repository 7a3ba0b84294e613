"""Where a data set comes from: its files are found, unpacked or fetched, and checked before use."""

import gzip
import http.client
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

from torchvision import datasets
from torchvision.datasets.utils import download_url

from diffusion_lab.common.messages import say
from diffusion_lab.data.source import verified_files
from diffusion_lab.data.source.verified_files import DataError, SourceUnavailable, missing

# sha256 of the uncompressed files; compressed ones differ from one distributor to the next
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts its files
SILENCE_SECONDS = 10  # how long a server may say nothing
APT_SECONDS = 300  # for 31 MB over a slow line


def fashion_mnist(root: Path) -> Path:
    """The folder root/FashionMNIST/raw with the four idx files, each verified.

    What is missing comes from `root` (plain idx files, also .gz), Debian's data folder,
    torchvision's mirror or Debian's package, in this order. Raises DataError.
    """
    raw = root / "FashionMNIST" / "raw"
    with verified_files.as_data_error(root):
        if not missing(raw, FASHION_MNIST):
            return raw
        with verified_files.workspace(raw) as scratch:
            say(f"FashionMNIST: looking in {root}")
            for folder in (raw, raw.parent, root, root / "fashion-mnist"):
                _take_fashion_mnist(folder, raw, scratch)
            reasons = []
            for name, fetch in (
                (str(DEBIAN_FOLDER), lambda _: DEBIAN_FOLDER),
                ("torchvision's mirror", _from_mirror),
                (f"Debian's package {DEBIAN_PACKAGE}", _from_debian),
            ):
                if not missing(raw, FASHION_MNIST):
                    break
                say(f"FashionMNIST: looking in {name}")
                try:
                    _take_fashion_mnist(fetch(scratch), raw, scratch)
                except SourceUnavailable as error:
                    say(f"FashionMNIST: {error}")
                    reasons.append(f"{name}: {error}")
            lacking = missing(raw, FASHION_MNIST)
    if lacking:
        raise DataError(
            f"FashionMNIST could not be fetched ({'; '.join(reasons)}): put "
            f"{' and '.join(lacking)}, as they are or as .gz, into {root}, or set root to the "
            "folder that holds them"
        )
    say(f"FashionMNIST: complete in {raw}")
    return raw


def cifar10(root: Path) -> Path:
    """The folder root/cifar-10-batches-py with torchvision's files, each verified.

    What is missing comes from the archive in `root`, or else from its download. Raises DataError.
    """
    source = datasets.CIFAR10
    files = dict([*source.train_list, *source.test_list])
    files[source.meta["filename"]] = source.meta["md5"]
    folder = root / source.base_folder
    with verified_files.as_data_error(root):
        if not missing(folder, files):
            return folder
        with verified_files.workspace(folder) as scratch:
            if not (lacking := missing(folder, files)):  # another process has just been here
                return folder
            archive = root / source.filename
            if archive.is_file():
                verified_files.check(archive, source.tgz_md5)
            else:
                say(f"CIFAR-10: downloading {source.url}")
                try:
                    with _network():
                        download_url(source.url, scratch, source.filename, source.tgz_md5)
                except SourceUnavailable as error:
                    raise DataError(
                        f"CIFAR-10 could not be fetched ({error}): put {source.filename} into "
                        f"{root}, or set root to the folder that holds it"
                    ) from error
                archive = scratch / source.filename
            say(f"CIFAR-10: unpacking {archive.name} into {folder}")
            with tarfile.open(archive) as tar:
                for member in tar:
                    parent, _, name = member.name.rpartition("/")
                    if parent == source.base_folder and name in lacking:
                        stream = tar.extractfile(member)
                        assert stream is not None, f"{name} is a file"
                        verified_files.install(stream, archive, folder / name, files[name], scratch)
    return folder


def _take_fashion_mnist(source: Path, raw: Path, scratch: Path) -> None:
    """Installs what `raw` lacks from the folder `source`, where it may be as .gz."""
    for name in missing(raw, FASHION_MNIST):
        for path in (source / name, source / f"{name}.gz"):
            if path.is_file():
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                    verified_files.install(
                        cast(IO[bytes], stream), path, raw / name, FASHION_MNIST[name], scratch
                    )
                break


@contextmanager
def _network() -> Iterator[None]:
    """For a download by torchvision: limits its silences and turns what it raises into a reason."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        raise SourceUnavailable(_last_line(str(error))) from error
    finally:
        socket.setdefaulttimeout(before)


def _from_mirror(scratch: Path) -> Path:
    with _network():
        datasets.FashionMNIST(scratch, download=True)
    return scratch / "FashionMNIST" / "raw"


def _from_debian(scratch: Path) -> Path:
    """Fetches and unpacks the package, which needs no administrator."""
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
        raise SourceUnavailable(f"there is no {error.filename} here") from error
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"{error.cmd[0]} took more than {APT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        reason = _last_line(error.stderr)
        if "Unable to locate" in reason:
            reason += ", which `apt-get update`, run as root, may mend"
        raise SourceUnavailable(reason) from error
    return scratch / DEBIAN_FOLDER.relative_to("/")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
