"""Creates, reads, resumes and opens run folders."""

from diffusion_lab.runs.base_run import OpenRun
from diffusion_lab.runs.diffusion_run import DiffusionRun, load
from diffusion_lab.runs.folder import (
    CONFIG,
    METRICS,
    SAMPLES,
    SUMMARY,
    check_new,
    create,
    load_config,
    load_summary,
    reopen,
    save_config,
    unfinished,
    write_summary,
)
from diffusion_lab.runs.opening import inherit, kind_of, open_diffusion_run, open_run
