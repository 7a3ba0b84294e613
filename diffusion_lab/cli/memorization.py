"""diffusion-lab memorization."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.analysis.memorization import memorization


def run(cfg: DictConfig) -> None:
    """Measures how much a run copies its training images."""
    result = memorization(cfg, list(HydraConfig.get().overrides.task))
    if cfg.json:
        print(json.dumps(result))
