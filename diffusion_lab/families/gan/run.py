"""The runs of GANs."""

from typing import ClassVar

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.gan import GANPipeline
from diffusion_lab.families.gan.building import build_generator
from diffusion_lab.runs.opened import NetworkRun


class GANRun(NetworkRun):
    """The open run of a GAN; the discriminator is not loaded."""

    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "a GAN"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[nn.Module, None]:
        return build_generator(saved, datamodule), None

    def pipeline(self, cfg: DictConfig) -> GANPipeline:
        return GANPipeline(self.model, self.datamodule.labels)


RUN = GANRun
