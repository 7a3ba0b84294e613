"""diffusion-lab evaluate."""

import json

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab import trained_run
from diffusion_lab.errors import require_whole_numbers
from diffusion_lab.evaluation import evaluate
from diffusion_lab.metrics import report
from diffusion_lab.progress import say


def run(cfg: DictConfig) -> None:
    """Measures a run and prints the figures with their floors."""
    require_whole_numbers(cfg, {"batch_size": 1, "seed": 0})
    opened = trained_run.open_run(cfg)
    overrides = list(HydraConfig.get().overrides.task)
    trained_run.inherit(cfg, opened.saved, ("sampler", "guidance", "metrics"), overrides)
    pipeline = opened.pipeline(cfg)
    metrics = opened.metrics(cfg)
    with opened.autocast:
        results = evaluate(pipeline, metrics, opened.datamodule, cfg.batch_size, cfg.seed)
    for line in report(results):
        say(line)
    if cfg.json:
        print(json.dumps(results))
