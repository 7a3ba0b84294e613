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
    groups, overrides = ("sampler", "guidance", "metrics"), list(HydraConfig.get().overrides.task)
    datamodule, pipeline, device, precision = runs.open_pipeline(cfg, groups, overrides)
    with as_user_error():
        metrics = instantiate(cfg.metrics)
        datamodule.prepare_data()
        datamodule.setup("fit")
        metrics.prepare(datamodule, device)
    with precision:
        results = evaluate(pipeline, metrics, datamodule, cfg.batch_size, cfg.seed)
    for line in report(results):
        say(line)
    if cfg.json:
        print(json.dumps(results))
