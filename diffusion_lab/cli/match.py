"""diffusion-lab match."""

import json

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.profiling.match import match


def run(cfg: DictConfig) -> None:
    """Prints the overrides that give a backbone the cost of the reference."""
    job = HydraConfig.get()
    result = match(
        cfg,
        list(job.overrides.task),
        job.runtime.choices.backbone,
        lambda overrides: compose("match", overrides=overrides),
    )
    print(" ".join(result["overrides"]))
    if cfg.json:
        print(json.dumps(result))
