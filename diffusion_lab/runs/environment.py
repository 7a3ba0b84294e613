"""The machine and the versions that a run's results depend on."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import diffusion_lab
from diffusion_lab.compute.device import cpu_info
from diffusion_lab.runs.files import DIRTY


def environment_of(device: torch.device) -> dict[str, object]:
    """The device, the versions and the commit that results depend on."""
    names = ("torch", "torchvision", "lightning", "hydra-core", "wandb")
    processor = cpu_info("model name") or platform.processor()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {processor}"
    return {
        "device": name,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"diffusion-lab": diffusion_lab.__version__}
        | {each: version(each) for each in names},
        "git_commit": git_commit(),
    }


@cache
def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, or None if it is installed.

    It is that of the first call in this process: commits during a training change nothing that was
    imported. It ends in DIRTY if the checkout has uncommitted changes.
    """
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", f"--dirty={DIRTY}", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
