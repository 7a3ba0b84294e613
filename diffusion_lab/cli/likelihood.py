"""diffusion-lab likelihood."""

import json

from omegaconf import DictConfig

from diffusion_lab.analysis.test_images import likelihood


def run(cfg: DictConfig) -> None:
    """Measures bits a dimension and prints them."""
    result = likelihood(cfg)
    if cfg.json:
        print(json.dumps(result))
