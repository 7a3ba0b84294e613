"""diffusion-lab train-extractor."""

import json

from omegaconf import DictConfig

from diffusion_lab.training.classifier import train_extractor


def run(cfg: DictConfig) -> None:
    """Trains the classifier and says how it is used."""
    result = train_extractor(cfg)
    if cfg.json:
        print(json.dumps(result))
