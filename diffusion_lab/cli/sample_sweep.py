"""diffusion-lab sample-sweep."""

import json

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.analysis.sample_sweep import sweep
from diffusion_lab.cli.combinations import admit, expand


def run(cfg: DictConfig) -> None:
    """Measures every combination of sampling settings and prints the table and the best."""
    single = [
        override
        for override in HydraConfig.get().overrides.task
        if not override.startswith("combinations=")
    ]

    def configure(chosen: dict[str, str]) -> tuple[DictConfig, list[str]]:
        overrides = [*single, *(admit(f"{key}={value}") for key, value in chosen.items())]
        return compose("sample_sweep", overrides=overrides), overrides

    result = sweep(cfg, expand(list(cfg.combinations)), configure)
    if cfg.json:
        print(json.dumps(result))
