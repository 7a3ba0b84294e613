"""Creates, reads, resumes and opens run folders.

The names below are imported on first use, so that reading a folder does not wait for torch.
"""

from importlib import import_module

HOMES = {
    "load": "diffusion_lab.families.diffusion.run",
    "load_config": "diffusion_lab.runs.folder",
    "load_summary": "diffusion_lab.runs.summary",
}


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
