"""Run folders: made, read back, resumed, opened."""

from diffusion_lab.runs.config import load_config, save_config
from diffusion_lab.runs.folder import (
    CONFIG,
    METRICS,
    SAMPLES,
    SUMMARY,
    check_new,
    create,
    load_summary,
    reopen,
    unfinished,
    write_summary,
)
from diffusion_lab.runs.opening import OpenRun, inherit, load, open_run

__all__ = [
    "CONFIG",
    "METRICS",
    "SAMPLES",
    "SUMMARY",
    "OpenRun",
    "check_new",
    "create",
    "inherit",
    "load",
    "load_config",
    "load_summary",
    "open_run",
    "reopen",
    "save_config",
    "unfinished",
    "write_summary",
]
