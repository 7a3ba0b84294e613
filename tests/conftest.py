"""Shared fixtures: the command line in this process, in an empty folder, on tiny data."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from tiny_data import TinyData

from diffusion_lab.cli import main
from diffusion_lab.common.images import to_float
from diffusion_lab.first_stage.autoencoder import files
from diffusion_lab.training.diffusion_module import DiffusionModule

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here is not waited for

TINY = [
    "data._target_=tiny_data.TinyData",
    "backbone=dit",
    "backbone.width=32",
    "backbone.heads=2",
    "backbone.depth=1",
    "backbone.patch=4",
    "trainer.accelerator=cpu",
    "+debug=fast",
]
TINY_AUTOENCODER = [
    "data._target_=tiny_data.TinyData",
    "autoencoder.channels=8",
    "autoencoder.multipliers=[1,1]",
    "trainer.accelerator=cpu",
    "logger=none",
    "+debug=fast",
]


def each_once(first: dict[str, object], second: dict[str, object]) -> list:
    """All pairs of two sets of named values; by default each of the first once, the rest slow."""
    return [
        pytest.param(
            a,
            b,
            id=f"{name}-{other}",
            marks=[] if (i - j) % len(second) == 0 else pytest.mark.slow,
        )
        for i, (name, a) in enumerate(first.items())
        for j, (other, b) in enumerate(second.items())
    ]


def tiny_first_stage(folder: Path, kind: str = "KL", **facts: object) -> Path:
    """A run folder with an untrained first stage of TinyData, whose latents have a wrong scale."""
    data = TinyData()
    data.setup("fit")
    settings = {"latent_channels": 4, "channels": 8, "multipliers": [1, 1], "blocks": 1}
    settings |= {"attention": False} | {
        "KL": {"kl_weight": 1e-6},
        "VQ": {"codes": 8, "decay": 0.9, "revive_below": 1.0, "commitment_weight": 0.25},
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = files.KINDS[kind](data.image_shape, **settings)
        model(to_float(data.train_images()))  # k-means
    known = {
        "kind": kind,
        "settings": settings,
        "image_shape": list(data.image_shape),
        "latent_mean": [0.1] * 4,
        "latent_std": [0.5] * 4,
        "data": data.images_fingerprint,
        "figures": {"rfid/efficientnet_lite0-96/train64-16": 12.5},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.save(model, files.Facts(**(known | facts)), folder / files.FILE)
    return folder


@pytest.fixture
def lab(tmp_path, monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """lab("train", ...) -> (exit code, standard output, standard error), run in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")  # of processes it starts
    # Hydra composes everything once more to look for hydra.mode, which no configuration here sets
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["diffusion-lab", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_folder(lab, tmp_path) -> Path:
    """A finished run on tiny data."""
    code, _, err = lab("train", *TINY, "run_dir=run")
    assert code == 0, err
    return tmp_path / "run"


class Killed(BaseException):
    """Stands for a kill: nothing of the run's own gets to see it."""


def die() -> None:
    """As good as kill -9."""
    raise Killed


def at_step(patch, step, act):
    """Has `act` called when that step begins, the first being 1."""
    original = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step - 1:
            act()
        return original(self, batch, batch_idx)

    patch.setattr(DiffusionModule, "training_step", training_step)


@pytest.fixture
def joblib() -> Iterator[list[str]]:
    """The overrides that run two jobs at once; their processes end with the test.

    Else they would wait for the next test's jobs in the folder of this one.
    """
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals.loky import get_reusable_executor

    yield ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    get_reusable_executor().shutdown(wait=True)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_files() -> Iterator[None]:
    with no_file_above(20_000):
        yield


def wandb_runs(folder: Path) -> set[str]:
    """The ids of the W&B runs of a run folder."""
    # a second part of the same second has a number after the id
    return {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}


@pytest.fixture(autouse=True)
def one_thread():
    """Tests are many and small: threads only get into each other's way."""
    torch.set_num_threads(1)
