"""Parts of building a model that is no diffusion model, and refusals of what does not fit it."""

from typing import Any

import torch
from omegaconf import DictConfig

from diffusion_lab.assembly.instantiate import Factory, errors_at, instantiate
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.backbone.conditioning import RawLabels
from diffusion_lab.common.messages import UserError

OF_DIFFUSION = ("schedule", "augmentation", "coupling", "alignment", "init_from")


def check_groups(cfg: DictConfig, *absent: str) -> None:
    """Raises UserError if a group or key was chosen that this family does not have."""
    for key in (*OF_DIFFUSION, *absent):
        if cfg.get(key):
            raise UserError(
                f"{key} is for diffusion models, and this is family={cfg.family}; leave {key} out"
            )


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
