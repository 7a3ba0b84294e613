"""How a GAN is trained: its LightningModule, and the task that a configuration describes."""

import math
from dataclasses import dataclass

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.assembly.parameter_groups import inner_matrices
from diffusion_lab.backbone.base import compile_network
from diffusion_lab.common.images import to_float
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data import ImageBatch
from diffusion_lab.families.gan import ConvGenerator, GANPipeline, RelativisticLoss
from diffusion_lab.families.gan.run import build_gan_loss, build_generator
from diffusion_lab.training.callbacks.stopping import DIVERSITY
from diffusion_lab.training.module import OneNumberModule, Optimization
from diffusion_lab.training.task import Task, build_datamodule, checked_parts

VALIDATION_SEED = 0  # an image is compared with the same noise in every run, whatever its seed


class GANModule(OneNumberModule):
    """Trains `model`, the generator, and the discriminator of `objective` on one sum of losses.

    Every image of a batch is paired with a sample of its label.
    """

    shown = "discriminator_loss"
    returns = frozenset({DIVERSITY})

    def __init__(
        self, model: ConvGenerator, objective: RelativisticLoss, optimization: Optimization
    ):
        super().__init__(optimization)
        self.model = model
        self.objective = objective

    def players(self) -> list[list[nn.Parameter]]:
        return [list(self.model.parameters()), list(self.objective.parameters())]

    @property
    def network(self) -> ConvGenerator:
        return self.model

    def hidden_matrices(self) -> list[nn.Parameter]:
        layers = self.objective.discriminator.layers
        return [
            *inner_matrices(self.model.blocks, ()),
            *inner_matrices(layers, (layers[0], layers[-1])),
        ]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the loss, (), and its parts, for images (b, C, H, W) uint8 and labels."""
        self.seed_share(batch_idx)
        real = to_float(batch.images)
        noise = torch.randn(len(real), self.model.latent_size, device=self.device)
        fake = self.model(noise, batch.labels)
        loss, parts = self.objective(real, fake, batch.labels)
        logged = {f"train/{name}": value.detach() for name, value in parts.items()}
        return {"loss": loss, DIVERSITY: diversity(fake.detach(), real, batch.labels), **logged}

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Adds up the discriminator's losses of validation or test images."""
        images, labels, ids = batch
        noise = SampleNoise(VALIDATION_SEED, ids.tolist(), self.device)((self.model.latent_size,))
        self.add(self.objective.found(to_float(images), self.model(noise, labels), labels))


def diversity(fake: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """How far samples (B, C, H, W) are from the mean of their label, relative to images, ().

    It falls to 0 where all samples of a label are alike. Labels (B,) are classes; numbers (B, K) do
    not divide the batch. NaN if no two images of the batch have one label.
    """
    places = labels if labels.ndim == 1 else torch.zeros_like(labels[:, 0])
    alike = (places[:, None] == places).to(torch.float32)
    mean_of = alike / alike.sum(1, keepdim=True)
    values = (each.float().flatten(1) for each in (fake, real))
    with torch.autocast(fake.device.type, enabled=False):  # which rounds products
        spreads = [(each - mean_of @ each).square().mean().sqrt() for each in values]
    return torch.where(alike.sum() > len(places), spreads[0] / spreads[1], math.nan)


@dataclass(frozen=True, kw_only=True)
class GANTask(Task):
    """Trains a generator against a discriminator, and draws samples with it during training."""

    module: GANModule

    def compile(self, mode: str | None) -> None:
        # the discriminator's gradients have gradients of their own, which compiled code has not;
        # Inductor fails on channels last with dynamic sizes
        compile_network(self.module.model, mode, dynamic=False)

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
    pipeline = GANPipeline(model)
    return GANTask(**checked_parts(cfg, data, module, pipeline))
