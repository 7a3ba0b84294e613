"""Run folders: made, read back, resumed, opened."""

from diffusion_lab.runs.config import load_config, save_config
from diffusion_lab.runs.diffusion_run import DiffusionRun, load
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
from diffusion_lab.runs.open_run import OpenRun
from diffusion_lab.runs.opening import inherit, kind_of, open_diffusion_run, open_run
