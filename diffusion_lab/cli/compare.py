"""diffusion-lab compare."""

import json

from omegaconf import DictConfig, ListConfig

from diffusion_lab.analysis.comparison import compare
from diffusion_lab.common.errors import UserError


def run(cfg: DictConfig) -> None:
    """Compares run folders and writes table, plots and page."""
    if not isinstance(cfg.paths, ListConfig):
        raise UserError(
            f"paths={cfg.paths} is no list of folders; write diffusion-lab compare {cfg.paths}"
        )
    if not cfg.paths:
        raise UserError(
            "give run folders, or folders that hold some: diffusion-lab compare outputs"
        )
    result = compare([str(path) for path in cfg.paths], str(cfg.output))
    if cfg.json:
        print(json.dumps(result))
