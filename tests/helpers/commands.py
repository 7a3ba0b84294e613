"""Runs the command line in this process, without the slow work that all commands repeat."""

import os
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.costs import ImageFacts, RunCost, counted
from diffusion_lab.cli import main
from diffusion_lab.metrics.extractor import EfficientNetLite0
from helpers.paths import ROOT, TESTS


def command_line(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `diffusion-lab` with these arguments in this process; returns its exit code."""
    GlobalHydra.instance().clear()
    patch.setattr(sys, "argv", ["diffusion-lab", *arguments])
    before = signal.getsignal(signal.SIGINT)
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        signal.signal(signal.SIGINT, before)  # which the end of the program ignores
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
    patch.setattr("diffusion_lab.families.diffusion.task.counted", cost_once)
    patch.setattr(os, "fsync", lambda _: None)  # a test does not lose power
    # Hydra composes everything again to look for hydra.mode, which no configuration here sets
    patch.setattr(Hydra, "get_mode", lambda *_, **__: None)


build_features = EfficientNetLite0.build


@cache
def pretrained_features():
    """Builds the frozen network of the metrics once, with a memory of the images it has seen.

    Commands observe the same real images again and again: half of the time of a tiny run.
    """
    network, checksum = build_features(EfficientNetLite0())
    compute, known = network.forward, {}

    def remembered(images: torch.Tensor) -> torch.Tensor:
        key = (images.device, images.shape, images.cpu().numpy().tobytes())
        if key not in known:
            if len(known) == 64:  # most are samples, which no other command sees
                known.clear()
            known[key] = compute(images)
        return known[key]

    network.forward = remembered
    return network, checksum


PARTS = (  # of a configuration: those that a network is built from
    *("schedule", "first_stage", "coupling", "objective", "augmentation", "denoiser", "backbone"),
    *("conditioning", "compile", "activation_checkpointing"),
)
costs: dict[str, RunCost] = {}


def cost_once(cfg: DictConfig, facts: ImageFacts) -> RunCost:
    """Counts the cost of a network once, which is a fifth of the time of a tiny run."""
    if "run" in cfg.first_stage:  # the shape of its latents is in a file
        return counted(cfg, facts)
    nodes = [cfg.get(part) for part in PARTS]
    plain = [
        OmegaConf.to_container(n, resolve=True) if OmegaConf.is_config(n) else n for n in nodes
    ]
    key = f"{plain} {facts}"
    if key not in costs:
        costs[key] = counted(cfg, facts)
    return costs[key]


def run_alone(folder: Path, *arguments: str) -> None:
    """Runs a command in a folder outside of any test, for results that several tests copy."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_for_commands(patch, folder)
        assert command_line(patch, *arguments) == 0
