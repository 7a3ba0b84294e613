"""The runs of models that are no diffusion models: an autoregressive one's, and a GAN's."""

from typing import ClassVar, cast

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.build import families
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoregressive import CodePipeline
from diffusion_lab.families.gan import GANPipeline
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.runs.network_run import NetworkRun


class AutoregressiveRun(NetworkRun):
    """The open run of an autoregressive model of codes."""

    limits: ClassVar[str] = "an autoregressive model"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[nn.Module, TrainedVQ]:
        return families.build_code_model(saved, datamodule)

    def pipeline(self, cfg: DictConfig) -> CodePipeline:
        stage = cast(TrainedVQ, self.first_stage)
        return families.build_code_pipeline(
            cfg, self.saved, self.model, stage, self.datamodule.labels
        )


class GANRun(NetworkRun):
    """The open run of a GAN; the discriminator is not loaded."""

    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "a GAN"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[nn.Module, None]:
        return families.build_generator(saved, datamodule), None

    def pipeline(self, cfg: DictConfig) -> GANPipeline:
        return GANPipeline(self.model, self.datamodule.labels)
