"""Builds autoregressive models of codes, and opens their runs."""

from math import prod
from typing import ClassVar, cast

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.data import ImageData
from diffusion_lab.families.autoregressive import (
    CodePipeline,
    CodeSampler,
    CodeTransformer,
    LogitGuidance,
)
from diffusion_lab.families.building import built, check_groups, require
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.runs.opened import NetworkRun


def build_code_model(
    cfg: DictConfig, datamodule: ImageData, device: str = "cpu"
) -> tuple[CodeTransformer, TrainedVQ]:
    """Builds a transformer and the first stage whose codes it predicts; raises UserError."""
    check_groups(cfg)
    first_stage = instantiate(cfg, "first_stage")(image_shape=datamodule.image_shape)
    if not isinstance(first_stage, TrainedVQ):
        raise UserError(
            "family=autoregressive predicts codes, which this first_stage does not have; train one "
            "with `diffusion-lab train-autoencoder autoencoder=vq`, and write first_stage=vq "
            "first_stage.run=FOLDER"
        )
    model = built(
        cfg,
        CodeTransformer,
        device,
        codes=first_stage.num_codes,
        tokens=prod(first_stage.latent_shape[1:]),
        labels=datamodule.labels,
    )
    return model, first_stage


def build_code_pipeline(
    cfg: DictConfig, saved: DictConfig, model: CodeTransformer, stage: TrainedVQ
) -> CodePipeline:
    """Builds the drawing of codes with the sampler and guidance of `cfg`; raises UserError.

    `saved` is the configuration that the model was trained by.
    """
    sampler, guidance = instantiate(cfg, "sampler"), instantiate(cfg, "guidance")
    require(saved, "sampler", sampler, CodeSampler)
    require(saved, "guidance", guidance, LogitGuidance)
    rules.check(
        guidance=guidance,
        conditional=model.conditioning.conditional,
        label_dropout=saved.objective.label_dropout,
    )
    return CodePipeline(model, sampler, guidance, stage)


class AutoregressiveRun(NetworkRun):
    """The open run of an autoregressive model of codes."""

    limits: ClassVar[str] = "an autoregressive model"

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageData) -> tuple[nn.Module, TrainedVQ]:
        return build_code_model(saved, datamodule)

    def pipeline(self, cfg: DictConfig) -> CodePipeline:
        stage = cast(TrainedVQ, self.first_stage)
        return build_code_pipeline(cfg, self.saved, self.model, stage)


RUN = AutoregressiveRun
