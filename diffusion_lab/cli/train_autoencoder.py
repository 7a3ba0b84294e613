"""diffusion-lab train-autoencoder."""

from omegaconf import DictConfig

from diffusion_lab.cli.train import run as run_training
from diffusion_lab.training.autoencoder_task import build_autoencoder_task


def run(cfg: DictConfig) -> float | None:
    """Trains one first stage; a job of a multirun is a run of the sweep's W&B group."""
    return run_training(cfg, "train-autoencoder", build_autoencoder_task)
