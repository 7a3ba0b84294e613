"""diffusion-lab inpaint."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.analysis.test_images import inpaint


def run(cfg: DictConfig) -> None:
    """Draws missing parts anew, and says where the picture is."""
    result = inpaint(cfg, list(HydraConfig.get().overrides.task))
    if cfg.json:
        print(json.dumps(result))
