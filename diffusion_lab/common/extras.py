"""Packages that are installed only with an extra of this one."""

from importlib import import_module
from typing import Any


def package(name: str, extra: str, user: str) -> Any:
    """The package `name`; raises ValueError, which says who uses it, where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{user} needs {name.replace('_', '-')}, which is not installed; run "
            f"`pip install 'diffusion-lab[{extra}]'`"
        ) from error
