"""Finds the folder of the configuration groups."""

from pathlib import Path

import diffusion_lab


def conf_dir() -> Path:
    """The folder of configuration groups: inside an installed package, next to it in a checkout."""
    package = Path(diffusion_lab.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
