"""The runs of autoregressive models of codes."""

from typing import ClassVar, cast

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoregressive import CodePipeline
from diffusion_lab.families.autoregressive.building import build_code_model, build_code_pipeline
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.runs.opened import NetworkRun


class AutoregressiveRun(NetworkRun):
    """The open run of an autoregressive model of codes."""

    limits: ClassVar[str] = "an autoregressive model"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[nn.Module, TrainedVQ]:
        return build_code_model(saved, datamodule)

    def pipeline(self, cfg: DictConfig) -> CodePipeline:
        stage = cast(TrainedVQ, self.first_stage)
        return build_code_pipeline(cfg, self.saved, self.model, stage, self.datamodule.labels)


RUN = AutoregressiveRun
