"""diffusion-lab evaluate."""

import json

from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from diffusion_lab import runs
from diffusion_lab.build import build_pipeline
from diffusion_lab.device import autocast, pick_device, pick_precision
from diffusion_lab.errors import as_user_error
from diffusion_lab.evaluation import evaluate
from diffusion_lab.metrics import report
from diffusion_lab.progress import say


def run(cfg: DictConfig) -> None:
    """Measures a run and prints the figures with their floors."""
    device = pick_device(cfg.device)
    saved, datamodule, model = runs.load(cfg.run)
    with open_dict(cfg):
        cfg.data = saved.data  # metrics keep their reference features beside the data
    model.denoiser.to(device).eval()
    pipeline = build_pipeline(cfg, model, datamodule.num_classes)
    with as_user_error():
        metrics = instantiate(cfg.metrics)
        datamodule.prepare_data()
        datamodule.setup("fit")
        metrics.prepare(datamodule, device)
    with autocast(pick_precision(cfg.precision, device), device):
        results = evaluate(pipeline, metrics, datamodule, cfg.batch_size, cfg.seed)
    for line in report(results):
        say(line)
    if cfg.json:
        print(json.dumps(results))
