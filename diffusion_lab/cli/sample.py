"""diffusion-lab sample."""

import json

from omegaconf import DictConfig

from diffusion_lab.sampling import sample


def run(cfg: DictConfig) -> None:
    """Draws images and says where they are."""
    result = sample(cfg)
    if cfg.json:
        print(json.dumps(result))
