"""diffusion-lab sample."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.analysis.sample import sample


def run(cfg: DictConfig) -> None:
    """Draws images and says where they are."""
    result = sample(cfg, list(HydraConfig.get().overrides.task))
    if cfg.json:
        print(json.dumps(result))
