"""diffusion-lab profile."""

import json

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.cli.combinations import expand
from diffusion_lab.profiling import budget
from diffusion_lab.profiling.costs import profile


def run(cfg: DictConfig) -> None:
    """Says what a composition costs, or every combination of the values that commas separate."""
    single = [
        override
        for override in HydraConfig.get().overrides.task
        if not override.startswith("combinations=")
    ]
    names = [
        [f"{key}={value}" for key, value in chosen.items()]
        for chosen in expand(list(cfg.combinations))
    ]
    compositions = [
        (compose("profile", overrides=[*single, *chosen]), [*single, *chosen]) for chosen in names
    ]
    for composed, overrides in compositions:
        if not cfg.run:
            budget.apply(composed, overrides)
    own = cfg.run or f"backbone={HydraConfig.get().runtime.choices.backbone}"
    profiles = profile(compositions, [" ".join(chosen) or own for chosen in names])
    if cfg.json:
        print(json.dumps({"profiles": profiles} if names[0] else profiles[0]))
