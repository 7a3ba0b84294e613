"""Imports packages that only an extra of this package installs."""

from importlib import import_module
from typing import Any


def package(name: str, extra: str, user: str) -> Any:
    """Imports the package `name`; if it is not installed, raises ValueError, naming its `user`."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{user} needs {name.replace('_', '-')}, which is not installed; run "
            f"`pip install 'diffusion-lab[{extra}]'`"
        ) from error
