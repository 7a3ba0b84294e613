"""diffusion-lab export."""

import json

from omegaconf import DictConfig

from diffusion_lab.common.progress import say
from diffusion_lab.runs.export import export


def run(cfg: DictConfig) -> None:
    """Writes a run's model to a folder of its own."""
    facts = export(cfg)
    say(
        f"Exported the {facts['weights']} weights of step {facts['step']} to {facts['output']}; "
        f"draw from them by diffusion-lab sample run={facts['output']}"
    )
    if cfg.json:
        print(json.dumps(facts))
