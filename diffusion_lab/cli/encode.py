"""diffusion-lab encode."""

import json

from omegaconf import DictConfig

from diffusion_lab.analysis.test_images import encode_images


def run(cfg: DictConfig) -> None:
    """Takes images to noise and back, and says where the picture is."""
    result = encode_images(cfg)
    if cfg.json:
        print(json.dumps(result))
