"""Builds GANs, and opens their runs."""

from typing import ClassVar

import torch
from omegaconf import DictConfig
from torch import nn

from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.data import ImageData
from diffusion_lab.families.building import built, check_groups, require
from diffusion_lab.families.gan import ConvGenerator, GANPipeline, RelativisticLoss
from diffusion_lab.runs.opened import NetworkRun


def build_generator(cfg: DictConfig, datamodule: ImageData, device: str = "cpu") -> ConvGenerator:
    """Builds the generator of a GAN; raises UserError."""
    check_groups(cfg, "sampler", "guidance", "first_stage")
    shape, labels = datamodule.image_shape, datamodule.labels
    return built(cfg, ConvGenerator, device, image_shape=shape, labels=labels)


def build_gan_loss(cfg: DictConfig, datamodule: ImageData) -> RelativisticLoss:
    """Builds the loss of a GAN with its discriminator; raises UserError if it does not fit."""
    shape, labels = datamodule.image_shape, datamodule.labels
    with errors_at(cfg, "objective"):
        factory, conditioning = instantiate(cfg, "objective"), instantiate(cfg, "conditioning")
        require(cfg, "objective", factory, RelativisticLoss)
        loss = factory(image_channels=shape[0], labels=labels, conditioning=conditioning)
        judge = loss.discriminator
        try:
            with torch.no_grad():
                judge(torch.zeros(1, *shape), judge.conditioning.labels.blank(1))
        except RuntimeError as error:
            raise ValueError(
                f"discriminator has too many layers for images of shape {shape}; use fewer"
            ) from error
    return loss


class GANRun(NetworkRun):
    """The open run of a GAN; the discriminator is not loaded."""

    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "a GAN"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageData) -> tuple[nn.Module, None]:
        return build_generator(saved, datamodule), None

    def pipeline(self, cfg: DictConfig) -> GANPipeline:
        return GANPipeline(self.model)


RUN = GANRun
