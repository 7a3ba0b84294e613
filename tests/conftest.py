"""Shared fixtures: the command line in this process, in an empty folder, on tiny data."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from helpers.commands import command_line, prepare_for_commands, run_alone
from helpers.fake_slurm import FakeSlurm
from helpers.faults import Killed, at_step, die, no_file_above
from helpers.gpu import DEVICE, simulate
from helpers.processes import SRUN, TORCHRUN
from helpers.refusals import sentence_of
from helpers.tiny_runs import TINY

from diffusion_lab.compute import slurm
from diffusion_lab.data.source.decoding import free_memory

MEMORY = Path("/dev/shm")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

if not os.environ.get("PLAIN_HYDRA") and hydra.__version__ < "1.4":
    from helpers.quick_hydra import compose_quickly

    compose_quickly()
simulate()
if MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, free_memory() or 0) > 12 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # files need not wait for a disk
os.environ["HF_HUB_OFFLINE"] = "1"  # do not wait for missing files


def pytest_collection_finish() -> None:
    """Excludes all imported objects from garbage collection, which saves 0.2 s each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need more GPUs than there are."""
    for item in items:
        mark = item.get_closest_marker("gpu")
        needed = mark.kwargs.get("devices", 1) if mark else 0
        if needed > torch.cuda.device_count() and DEVICE == "cuda":
            item.add_marker(pytest.mark.skip(reason="there are too few CUDA devices"))


class Lab:
    """The command line of this process: lab("train", ...) -> (exit code, stdout, stderr)."""

    def __init__(self, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture):
        self.patch, self.captured = patch, captured

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.captured.readouterr()  # discards earlier output, as of fixtures
        code = command_line(self.patch, *arguments)
        out, err = self.captured.readouterr()
        return code, out, err

    def done(self, *arguments: str, code: int = 0) -> str:
        """Returns the standard error of a command, which must end with this exit code."""
        ended, _, err = self(*arguments)
        assert ended == code, err
        return err

    def result(self, *arguments: str) -> dict:
        """The result that a command prints with json=true."""
        code, out, err = self(*arguments, "json=true")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    def drawn(self, *arguments: str) -> dict[str, np.ndarray]:
        """The arrays that `sample` writes with these arguments."""
        with np.load(self.result("sample", "save=npz", *arguments)["array"]) as arrays:
            return dict(arrays)


@pytest.fixture
def lab(tmp_path, monkeypatch, capfd) -> Lab:
    """The command line, in an empty folder."""
    prepare_for_commands(monkeypatch, tmp_path)
    return Lab(monkeypatch, capfd)


@pytest.fixture
def refusal(lab) -> Callable[..., str]:
    """A function: refusal("train", ...) -> the only sentence of a command with exit code 2."""

    def run(*arguments: str) -> str:
        code, _, err = lab(*arguments)
        assert code == 2, err
        return sentence_of(err)

    return run


@pytest.fixture
def killed_at_step(lab, monkeypatch) -> Callable[..., None]:
    """A function: killed_at_step(5, "train", ...) runs a command that dies as that step begins."""

    def run(step: int, *arguments: str) -> None:
        with monkeypatch.context() as patch:
            at_step(patch, step, die)
            with pytest.raises(Killed):
                lab(*arguments)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run on tiny data that is trained once for all tests; no test may change it."""
    folder = tmp_path_factory.mktemp("finished")
    run_alone(folder, "train", *TINY, "run_dir=run", "callbacks.sample_grid.every_n_steps=2")
    return folder / "run"


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Callable[..., Path]:
    """A function: trained_once("train", ...) -> the folder in which that command ran, once.

    No test may write to the folder: copy what a test changes.
    """

    @cache
    def folder_of(*arguments: str) -> Path:
        run_alone(folder := tmp_path_factory.mktemp("trained"), *arguments)
        return folder

    return folder_of


@pytest.fixture
def run_folder(lab, tmp_path, finished_run) -> Path:
    """A copy of the finished run, and of its data's features, in the folder of `lab`."""
    shutil.copytree(finished_run.parent / "data", tmp_path / "data")
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def blank_plots(monkeypatch) -> None:
    """Paints the plots of comparisons, but writes empty pictures in their place, to save time."""
    from diffusion_lab.report.figures import FigureCanvasSVG

    blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr(FigureCanvasSVG, "print_svg", lambda _, file, **more: file.write(blank))


@pytest.fixture
def joblib() -> Iterator[list[str]]:
    """The overrides that run two jobs at once; the worker processes end with the test.

    Otherwise they would take the next test's jobs, still in the folder of this test.
    """
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals.loky import get_reusable_executor

    yield ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def small_files() -> Iterator[None]:
    with no_file_above(20_000):
        yield


@pytest.fixture
def environment(monkeypatch):
    """A function that sets these variables of SLURM or torchrun and removes all others.

    There is no terminal, as in tasks of srun.
    """
    monkeypatch.setattr(slurm, "has_terminal", lambda: False)

    def set_all(variables: dict[str, str]) -> None:
        for name in [*SRUN, *TORCHRUN, "SLURM_NTASKS_PER_NODE", "SLURM_RESTART_COUNT"]:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_all({})
    return set_all


@pytest.fixture(autouse=True)
def one_thread():
    """Uses one thread: the tests are small, and more threads only slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture
def browser():
    """A headless Chromium; where there is none the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
