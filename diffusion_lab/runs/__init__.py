"""Creates, reads, resumes and opens run folders.

The names below are imported on first use, so that reading a folder does not wait for torch.
"""

from importlib import import_module

HOMES = {"load": "diffusion_run", "load_config": "folder", "load_summary": "files"}


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
