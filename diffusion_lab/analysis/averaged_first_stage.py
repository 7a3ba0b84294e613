"""Averages of an autoencoder's weights as first stages: latents and reconstructions measured."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import build_datamodule, read_data
from diffusion_lab.compute.device import pick_device
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoencoder.task import latent_moments
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.metrics.prepared import PreparedMetrics
from diffusion_lab.runs.opened import move_data
from diffusion_lab.training.callbacks.evaluation import reconstruction_metrics


@dataclass(frozen=True)
class AveragedFirstStages:
    """Writes averages of the autoencoder of the run `cfg.run`, whose configuration is `saved`.

    rFID and its companions are measured if the run measured them. Raises UserError if the run has
    not ended yet, as its first stage says what the autoencoder is.
    """

    cfg: DictConfig
    saved: DictConfig

    @cached_property
    def data(self) -> ImageDataModule:
        """The run's data, read."""
        if self.cfg.data_root:
            move_data(self.saved.data.source, self.cfg.data_root)
        datamodule = build_datamodule(self.saved)
        read_data(self.saved, datamodule)
        return datamodule

    @cached_property
    def device(self) -> torch.device:
        """The device that measures."""
        return pick_device(self.cfg.device)

    @cached_property
    def metrics(self) -> PreparedMetrics:
        """The run's metrics, with the reference's features."""
        metrics = instantiate(self.saved, "metrics")
        with errors_at(self.saved, "metrics"):
            metrics.load(self.data, self.device)
            return PreparedMetrics.of(metrics, self.data)

    def save(self, tensors: dict[str, Tensor], folder: Path) -> dict[str, float]:
        """Writes a first stage with these weights to a folder; returns the metrics measured."""
        with errors_at(self.saved, ""):
            path = Path(self.cfg.run) / saving.FIRST_STAGE_FILE
            autoencoder, facts, _ = saving.load_autoencoder(path)
        autoencoder.load_state_dict(tensors)
        mean, std = latent_moments(autoencoder, self.data, self.device)
        results = {}
        if any(name.startswith("rfid") for name in facts.metrics):
            results = reconstruction_metrics(
                autoencoder, self.data, self.metrics, self.cfg.batch_size
            )
        facts = replace(facts, latent_mean=mean, latent_std=std, metrics=results)
        saving.save_autoencoder(autoencoder, facts, folder / saving.FIRST_STAGE_FILE)
        return results
