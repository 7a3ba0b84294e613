"""diffusion-lab evaluate."""

import json

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from diffusion_lab import runs
from diffusion_lab.errors import as_user_error, require_whole_numbers
from diffusion_lab.evaluation import evaluate
from diffusion_lab.metrics import report
from diffusion_lab.progress import say


def run(cfg: DictConfig) -> None:
    """Measures a run and prints the figures with their floors."""
    require_whole_numbers(cfg, {"batch_size": 1, "seed": 0})
    opened = runs.open_run(cfg)
    overrides = list(HydraConfig.get().overrides.task)
    runs.inherit(cfg, opened.saved, ("sampler", "guidance", "metrics"), overrides)
    pipeline = opened.pipeline(cfg)
    with as_user_error():
        metrics = instantiate(cfg.metrics)
        opened.datamodule.prepare_data()
        opened.datamodule.setup("fit")
        metrics.prepare(opened.datamodule, opened.device)
    with opened.autocast:
        results = evaluate(pipeline, metrics, opened.datamodule, cfg.batch_size, cfg.seed)
    for line in report(results):
        say(line)
    if cfg.json:
        print(json.dumps(results))
