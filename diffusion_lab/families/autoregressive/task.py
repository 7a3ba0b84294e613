"""The task of training an autoregressive model of codes, built from a configuration."""

from dataclasses import dataclass

import lightning
import torch
from omegaconf import DictConfig

from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.families.autoregressive.building import (
    build_code_loss,
    build_code_model,
    build_code_pipeline,
)
from diffusion_lab.families.autoregressive.module import AutoregressiveModule
from diffusion_lab.pipeline import Generator
from diffusion_lab.training.module import Optimization
from diffusion_lab.training.task import Task, checked_parts


@dataclass(frozen=True, kw_only=True)
class AutoregressiveTask(Task):
    """Trains a transformer on a first stage's codes, and draws samples with it during training."""

    module: AutoregressiveModule
    pipeline: Generator

    def compile(self) -> None:
        for block in self.module.model.layers:
            block.compile()

    def prepare(self, device: torch.device) -> dict[str, object]:
        self.module.model.conditioning.labels.learn(self.datamodule.train_labels())
        stage = self.module.first_stage
        self.datamodule.encoded = stage.prepare(self.datamodule, device)
        return {"first_stage": stage.facts()}


def build_task(cfg: DictConfig, device: str = "cpu") -> AutoregressiveTask:
    """Builds the task of an autoregressive model; raises UserError for what cannot work."""
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build_datamodule(cfg)
    model, first_stage = build_code_model(cfg, data, device)
    module = AutoregressiveModule(
        model, build_code_loss(cfg), first_stage, Optimization.configured(cfg)
    )
    pipeline = build_code_pipeline(cfg, cfg, model, first_stage, data.labels)
    return AutoregressiveTask(**checked_parts(cfg, data, module, pipeline))
