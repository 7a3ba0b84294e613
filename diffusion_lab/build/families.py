"""Builds the models that are no diffusion models, and refuses what does not fit them."""

from math import prod
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.backbone.conditioning import RawLabels
from diffusion_lab.build import rules
from diffusion_lab.build.config_keys import replaced
from diffusion_lab.build.instantiate import Factory, errors_at, instantiate
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoregressive import (
    CodePipeline,
    CodeSampler,
    CodeTransformer,
    LogitGuidance,
    NextCode,
)
from diffusion_lab.families.gan import ConvGenerator, RelativisticLoss
from diffusion_lab.first_stage import TrainedVQ

DIFFUSION, AUTOREGRESSIVE, GAN = "diffusion", "autoregressive", "gan"
PLACE = "diffusion_lab.families."  # starts the names of classes of the other families
OF_DIFFUSION = ("schedule", "augmentation", "coupling", "alignment", "init_from")


def family_of(cfg: DictConfig) -> str:
    """The family of generative models that a configuration of `train` belongs to.

    Raises UserError for one that is not known.
    """
    family = cfg.get("family") or DIFFUSION  # as in runs of earlier versions, without such a key
    if family not in (DIFFUSION, AUTOREGRESSIVE, GAN):
        raise UserError(
            f"family={family} is not known; it must be {DIFFUSION}, {AUTOREGRESSIVE} or {GAN}"
        )
    return family


def require_diffusion(cfg: DictConfig) -> None:
    """Raises UserError if a configuration, or a part of it, is of another family than diffusion."""
    if (family := family_of(cfg)) != DIFFUSION:
        raise UserError(
            f"family={family} has no noise levels, which this command needs; write family=diffusion"
        )
    if "denoiser" in cfg and cfg.denoiser is None:  # as in the other families
        raise replaced("denoiser", None)
    for group in ("backbone", "objective", "sampler", "guidance"):
        target = str(OmegaConf.select(cfg, f"{group}._target_"))
        if target.startswith(PLACE):
            raise UserError(
                f"{group}={target.rpartition('.')[2]} is no part of a diffusion model; choose "
                f"another {group}, or the family that it is of with family=..."
            )


def check_groups(cfg: DictConfig, *absent: str) -> None:
    """Raises UserError if a group or key was chosen that this family does not have."""
    for key in (*OF_DIFFUSION, *absent):
        if cfg.get(key):
            raise UserError(
                f"{key} is for diffusion models, and this is family={cfg.family}; leave {key} out"
            )


def build_code_model(
    cfg: DictConfig, datamodule: ImageDataModule, device: str = "cpu"
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


def build_code_loss(cfg: DictConfig) -> NextCode:
    """Builds the loss of an autoregressive model; raises UserError for another objective."""
    objective = instantiate(cfg, "objective")
    require(cfg, "objective", objective, NextCode)
    return objective


def build_generator(
    cfg: DictConfig, datamodule: ImageDataModule, device: str = "cpu"
) -> ConvGenerator:
    """Builds the generator of a GAN; raises UserError."""
    check_groups(cfg, "sampler", "guidance", "first_stage")
    shape, labels = datamodule.image_shape, datamodule.labels
    return built(cfg, ConvGenerator, device, image_shape=shape, labels=labels)


def built(cfg: DictConfig, kind: type, device: str, **facts: object):
    """Builds `cfg.backbone`, which must be of this class, with the conditioning and facts."""
    with torch.device(device), errors_at(cfg, "backbone"):
        factory, conditioning = instantiate(cfg, "backbone"), instantiate(cfg, "conditioning")
        require(cfg, "backbone", factory, kind)
        model = factory(conditioning=conditioning, **facts)
    if isinstance(model.conditioning, RawLabels):
        raise UserError(
            f"conditioning=raw_labels is for networks that embed labels themselves, and those of "
            f"family={cfg.family} do not; write conditioning=class_label"
        )
    if cfg.activation_checkpointing:
        with errors_at(cfg, ""):
            checkpoint_activations(model)
    return model


def require(cfg: DictConfig, group: str, chosen: object, kind: type) -> None:
    """Raises UserError if the object, or factory, that a group chose is not the family's."""
    found: Any = chosen.target.func if isinstance(chosen, Factory) else type(chosen)
    if not issubclass(found, kind):
        raise UserError(
            f"{group}={found.__name__} does not fit family={cfg.family}; leave {group}=... out"
        )


def build_code_pipeline(
    cfg: DictConfig, saved: DictConfig, model: CodeTransformer, stage: TrainedVQ, kind: Labels
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
    return CodePipeline(model, sampler, guidance, stage, kind)


def build_gan_loss(cfg: DictConfig, datamodule: ImageDataModule) -> RelativisticLoss:
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
