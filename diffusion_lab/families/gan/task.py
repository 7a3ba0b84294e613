"""The task of training a GAN, built from a configuration."""

from dataclasses import dataclass

import lightning
import torch
from omegaconf import DictConfig

from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.families.gan import GANPipeline
from diffusion_lab.families.gan.building import build_gan_loss, build_generator
from diffusion_lab.families.gan.module import GANModule
from diffusion_lab.pipeline import Generator
from diffusion_lab.training.module import Optimization
from diffusion_lab.training.task import Task, checked_parts


@dataclass(frozen=True, kw_only=True)
class GANTask(Task):
    """Trains a generator against a discriminator, and draws samples with it during training."""

    module: GANModule
    pipeline: Generator

    def compile(self) -> None:
        # the discriminator's gradients have gradients of their own, which compiled code has not;
        # Inductor fails on channels last with dynamic sizes
        self.module.model.compile(dynamic=False)

    def prepare(self, device: torch.device) -> dict[str, object]:
        for network in (self.module.model, self.module.objective.discriminator):
            network.conditioning.labels.learn(self.datamodule.train_labels())
        return {}


def build_task(cfg: DictConfig, device: str = "cpu") -> GANTask:
    """Builds the task of a GAN; raises UserError for what cannot work."""
    if cfg.trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed loses the small gradients that a GAN's penalty squares; "
            "write trainer.precision=bf16-mixed or 32-true"
        )
    if sharded(cfg.trainer):
        raise UserError(
            "trainer=fsdp cannot shard a GAN, whose penalty needs gradients of gradients; use "
            "trainer=ddp"
        )
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build_datamodule(cfg)
    model = build_generator(cfg, data, device)
    module = GANModule(model, build_gan_loss(cfg, data), Optimization.configured(cfg))
    pipeline = GANPipeline(model, data.labels)
    return GANTask(**checked_parts(cfg, data, module, pipeline))
