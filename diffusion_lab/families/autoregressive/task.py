"""How a model of codes is trained: its LightningModule, and the task of a configuration."""

import math
from dataclasses import dataclass

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.assembly.parameter_groups import inner_matrices
from diffusion_lab.backbone.base import compile_network
from diffusion_lab.data import ImageBatch, MomentBatch
from diffusion_lab.families.autoregressive import CodeTransformer, NextCode
from diffusion_lab.families.autoregressive.model import nats
from diffusion_lab.families.autoregressive.run import build_code_model, build_code_pipeline
from diffusion_lab.families.building import require
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.training.module import OneNumberModule, Optimization
from diffusion_lab.training.task import Task, build_datamodule, checked_parts


class AutoregressiveModule(OneNumberModule):
    """Encodes images to codes, and trains `model` to predict each from those before it."""

    shown = "bits_per_code"

    def __init__(
        self,
        model: CodeTransformer,
        objective: NextCode,
        first_stage: TrainedVQ,
        optimization: Optimization,
    ):
        super().__init__(optimization)
        self.model = model
        self.objective = objective
        self.first_stage = first_stage

    @property
    def network(self) -> CodeTransformer:
        return self.model

    def hidden_matrices(self) -> list[nn.Parameter]:
        return inner_matrices(self.model.blocks, ())

    def training_step(self, batch: ImageBatch | MomentBatch, batch_idx: int) -> Tensor:
        """Returns the mean loss of a code, (), for b images, or for their moments."""
        self.seed_share(batch_idx)
        codes = self.first_stage.codes(batch.encoded(self.first_stage)).flatten(1)  # (B, N)
        return self.objective(self.model, codes, batch.labels)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Adds up the negative log-likelihoods of the codes of validation or test images."""
        images, labels, _ = batch
        codes = self.first_stage.codes(self.first_stage.moments(images)).flatten(1)
        self.add(nats(self.model, codes, labels) / math.log(2))


@dataclass(frozen=True, kw_only=True)
class AutoregressiveTask(Task):
    """Trains a transformer on a first stage's codes, and draws samples with it during training."""

    module: AutoregressiveModule

    def compile(self, mode: str | None) -> None:
        for block in self.module.model.layers:
            compile_network(block, mode)

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
    objective = instantiate(cfg, "objective")
    require(cfg, "objective", objective, NextCode)
    module = AutoregressiveModule(model, objective, first_stage, Optimization.configured(cfg))
    pipeline = build_code_pipeline(cfg, cfg, model, first_stage)
    return AutoregressiveTask(**checked_parts(cfg, data, module, pipeline))
