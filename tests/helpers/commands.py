"""Runs the command line in this process, without the slow work that all commands repeat."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from diffusion_lab.cli import main
from diffusion_lab.metrics.extractor import EfficientNetLite0
from helpers.paths import ROOT, TESTS


def command_line(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `diffusion-lab` with these arguments in this process; returns its exit code."""
    GlobalHydra.instance().clear()
    patch.setattr(sys, "argv", ["diffusion-lab", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def prepare_for_commands(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Moves to `folder`, offline, and patches slow work that is the same in all commands."""
    patch.chdir(folder)
    patch.delenv("DIFFUSION_LAB_DATA", raising=False)
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")
    patch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{ROOT}")  # for child processes
    patch.setattr(EfficientNetLite0, "build", lambda _: pretrained_features())
    # Hydra composes everything again to look for hydra.mode, which no configuration here sets
    patch.setattr(Hydra, "get_mode", lambda *_, **__: None)


build_features = EfficientNetLite0.build


@cache
def pretrained_features():
    """Builds the frozen network of the metrics once for all commands of this process."""
    return build_features(EfficientNetLite0())


def run_alone(folder: Path, *arguments: str) -> None:
    """Runs a command in a folder outside of any test, for results that several tests copy."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_for_commands(patch, folder)
        assert command_line(patch, *arguments) == 0
