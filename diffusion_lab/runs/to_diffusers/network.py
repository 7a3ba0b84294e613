"""Denoisers as networks of diffusers, which embed labels themselves."""

import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.assembly.model import Drawable
from diffusion_lab.backbone import DiffusersModel, DiffusersUNet, DiT
from diffusion_lab.backbone.conditioning import Attributes
from diffusion_lab.backbone.diffusers_networks import network_class, settings_of
from diffusion_lab.backbone.embedding import UNetEmbedding
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import BlockResampling, ConvResampling
from diffusion_lab.backbone.unet import UNet, UpLevel
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.runs.importing.kind.base import joined
from diffusion_lab.runs.to_diffusers.dit import renamed_dit, settings_of_dit
from diffusion_lab.runs.to_diffusers.scheduler import first_place, without_counterpart

# what UNet2DModel has in place of each option of `backbone`, and the only value that is the same
FIXED: dict[str, tuple[object, str]] = {
    "patch": (1, "the U-Net of diffusers works on single pixels"),
    "pyramid": (False, "the U-Net of diffusers gets the image once"),
    "attend_once": (False, "all stages of a level attend in the U-Net of diffusers, or none"),
    "stage.cross_attention": (False, "the U-Net of diffusers attends to pixels alone"),
    "stage.qk_norm": (False, "the U-Net of diffusers does not normalise queries and keys"),
    "stage.skip_scale": (1.0, "the U-Net of diffusers does not scale the output of a stage"),
    "embedding.condition_first": (
        False,
        "the U-Net of diffusers adds labels after the noise's layers",
    ),
    "resample.projection": (False, "the U-Net of diffusers has no projection there"),
}
ENDS = {
    "entry": "conv_in",
    "noise.0": "time_embedding.linear_1",
    "noise.2": "time_embedding.linear_2",
    "norm": "conv_norm_out",
    "out": "conv_out",
}
RESIDUAL = {f"residual.{name}": name for name in ("norm1", "conv1", "norm2", "conv2")}
RESIDUAL |= {"residual.embedding": "time_emb_proj", "residual.skip": "conv_shortcut"}
ATTENTION = {
    "attention.norm": "group_norm",
    "attention.attention.qkv": "to_qkv",  # three layers in diffusers
    "attention.attention.out": "to_out.0",
}
GROUPS = """
GROUPS = {}  # of norms by their channels, which config.json cannot say
for module in model.modules():
    if isinstance(module, torch.nn.GroupNorm):
        module.num_groups = GROUPS[module.num_channels]
"""


def settings_of_unet(unet: UNet, cfg: DictConfig) -> dict[str, Any]:
    """The settings of UNet2DModel that make it compute what this U-Net of a run does.

    Raises UserError, which names an option of the run's configuration, if there are none.
    """
    own = cfg.backbone
    for key, (value, reason) in FIXED.items():
        if (given := OmegaConf.select(own, key, default=value)) != value:
            raise without_counterpart(f"backbone.{key}={given}".replace("True", "true"), reason)
    if own.multipliers[0] != 1:
        raise without_counterpart(
            f"backbone.multipliers={list(own.multipliers)}",
            "the finest level of the U-Net of diffusers is as wide as its first layer",
        )
    resample = type(instantiate(cfg, "backbone.resample"))
    if resample not in (ConvResampling, BlockResampling):
        raise without_counterpart(
            "this backbone/resample", "the U-Net of diffusers resamples as conv and block do alone"
        )
    frequencies, channels = unet.noise.frequencies, unet.entry.out_channels
    if type(unet.noise) is not UNetEmbedding or frequencies != channels:
        raise without_counterpart(
            "this backbone/embedding",
            "the U-Net of diffusers has as many sinusoids as channels at the finest level",
        )
    groups, eps = norm_of(unet)
    fewest = math.gcd(*groups.values())  # of which norms with more are made afterwards
    blocked = resample is BlockResampling
    attends = [level in own.attention for level in range(len(own.multipliers))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if blocked else ("DownBlock2D", "UpBlock2D")
    kind = "resnet" if blocked else "conv"
    return {
        "block_out_channels": [channels * multiplier for multiplier in own.multipliers],
        "layers_per_block": own.blocks,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attends)],
        "downsample_type": kind,
        "upsample_type": kind,
        "time_embedding_dim": unet.noise.width,
        "freq_shift": int(unet.noise.closed),
        "attention_head_dim": head_channels(own.stage),
        "norm_num_groups": fewest,
        "attn_norm_num_groups": fewest,
        "norm_eps": eps,
        "dropout": own.stage.dropout,
        "resnet_time_scale_shift": "scale_shift" if own.stage.scale_shift else "default",
    }


def norm_of(unet: UNet) -> tuple[dict[int, int], float]:
    """The number of groups of norms by their channels, and the epsilon of all."""
    norms = [module for module in unet.modules() if isinstance(module, GroupNorm)]
    return {norm.num_channels: norm.num_groups for norm in norms}, norms[0].eps


def head_channels(stage: DictConfig) -> int | None:
    """The channels of each head of attention; None for one head."""
    if stage.head_channels is None and stage.get("heads", 1) > 1:
        raise without_counterpart(
            f"backbone.stage.heads={stage.heads}",
            "heads of the U-Net of diffusers have as many channels in all levels",
            "train with backbone.stage.head_channels, or leave format out",
        )
    return stage.head_channels


def renamed(unet: UNet) -> dict[str, Tensor]:
    """The weights of a U-Net under the names of UNet2DModel."""
    tensors = unet.state_dict()
    found: dict[str, Tensor] = {}
    for ours, theirs in modules(unet).items():
        place, together, _ = theirs.partition("to_qkv")
        names = [f"{place}to_{part}" for part in "qkv"] if together else [theirs]
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in tensors:  # not of a skip that changes nothing
                parts = zip(names, tensors[f"{ours}.{leaf}"].chunk(len(names)), strict=True)
                found |= {f"{name}.{leaf}": part for name, part in parts}
    return found


def modules(unet: UNet) -> dict[str, str]:
    """Our name of each module that may have weights, and its name in diffusers."""
    levels = [level for level in unet.up if isinstance(level, UpLevel)]
    blocks = len(levels[0].stages) - 1
    stages = {f"middle.{i}": ("mid_block", i) for i in range(2)}
    resampling = {}
    for index in range(len(unet.down)):
        level, i = divmod(index, blocks + 1)
        if i < blocks:
            stages[f"down.{index}"] = f"down_blocks.{level}", i
        else:
            resampling[f"down.{index}"] = f"down_blocks.{level}.downsamplers.0"
    for level in range(len(levels)):
        stages |= {f"up.{level}.stages.{i}": (f"up_blocks.{level}", i) for i in range(blocks + 1)}
        resampling[f"up.{level}.upsample"] = f"up_blocks.{level}.upsamplers.0"
    residual = {ours: f"{theirs}.resnets.{i}" for ours, (theirs, i) in stages.items()} | resampling
    attention = {ours: f"{theirs}.attentions.{i}" for ours, (theirs, i) in stages.items()}
    convolutions = {f"{ours}.module": f"{theirs}.conv" for ours, theirs in resampling.items()}
    return ENDS | convolutions | joined(residual, RESIDUAL) | joined(attention, ATTENTION)


CLOSE = 1e-4  # largest difference of an output, relative to outputs above 1
TABLE = "class_embedding.weight"  # of a U-Net
REMEDY = "train backbone=unet, dit, diffusers_unet or diffusers_model, or leave format out"


def network_of(model: Drawable, cfg: DictConfig) -> tuple[Any, str]:
    """The network of diffusers that answers as the model's does, in evaluation mode.

    With it comes code that changes `model`, as it is loaded, where its config.json cannot. `cfg` is
    the run's configuration. A null label that was never trained is left out of a U-Net. Raises
    UserError if diffusers has no such network.
    """
    denoiser = model.denoiser
    check_denoiser(denoiser, model.loss.of_samples)
    name, settings, tensors, changes = parts_of(denoiser, cfg)
    if name == "UNet2DModel":
        if isinstance(denoiser.conditioning, Attributes):
            tensors[TABLE] = table_of(denoiser.conditioning)
        if TABLE in tensors and model.label_dropout == 0:
            tensors[TABLE] = tensors[TABLE][: denoiser.conditioning.labels.classes]
        rows = len(tensors.get(TABLE, []))
        settings |= {"class_embed_type": None, "num_class_embeds": rows or None}
    channels, height, width = denoiser.image_shape
    network = network_class(name)(
        **settings,
        in_channels=channels,
        out_channels=channels * (1 + denoiser.learned_variance),
        sample_size=height if height == width else (height, width),
    )
    network.load_state_dict(tensors)
    exec(changes, {"model": network, "torch": torch})  # the lines above, as in sample.py
    if first_place(model):
        count_from_zero(network)
    check_same(model, network.eval())
    return network, changes


def parts_of(
    denoiser: Denoiser, cfg: DictConfig
) -> tuple[str, dict[str, Any], dict[str, Tensor], str]:
    """The class of diffusers that a backbone is, settings, weights by its names, and changes."""
    backbone, conditioning = denoiser.backbone, denoiser.conditioning
    if isinstance(backbone, DiffusersModel | DiffusersUNet):
        name, network = type(backbone.network).__name__, backbone.network
        settings = {key: network.config[key] for key in settings_of(name)}
        return name, settings, network.state_dict(), ""
    if type(backbone) is UNet:
        settings, (groups, _) = settings_of_unet(backbone, cfg), norm_of(backbone)
        several = len(set(groups.values())) > 1
        changes = GROUPS.format(dict(sorted(groups.items()))) if several else ""
        return "UNet2DModel", settings, renamed(backbone), changes
    if type(backbone) is DiT:
        if not isinstance(conditioning, Attributes):
            raise without_counterpart("this conditioning", "the DiT of diffusers needs classes")
        settings, changes = settings_of_dit(backbone, cfg)
        settings["num_embeds_ada_norm"] = conditioning.labels.classes
        weights = renamed_dit(backbone, table_of(conditioning))
        return "DiTTransformer2DModel", settings, weights, changes
    reason = "diffusers has no network that computes the same"
    raise without_counterpart(f"the backbone {type(backbone).__name__}", reason, REMEDY)


@torch.no_grad()
def count_from_zero(network: Any) -> None:
    """Makes a network that is told noise levels from 1 on answer the same from 0 on.

    The sinusoids of a level and of the next one differ by a rotation, which the weights take up.
    """
    if hasattr(network, "time_proj"):
        embeddings = [(network.time_proj, network.time_embedding)]
    else:
        blocks = [block.norm1.emb for block in network.transformer_blocks]
        embeddings = [(block.time_proj, block.timestep_embedder) for block in blocks]
    for waves, layers in embeddings:
        if type(waves).__name__ != "Timesteps":
            raise without_counterpart(
                "backbone.settings.time_embedding_type", "on this schedule only positional can be"
            )
        weight = layers.linear_1.weight.double()
        cosine, sine = waves(torch.ones(1)).double().chunk(2, 1)
        first, second = weight.chunk(2, 1)
        if not waves.flip_sin_to_cos:
            cosine, sine = sine, -cosine
        turned = [first * cosine + second * sine, second * cosine - first * sine]
        layers.linear_1.weight.copy_(torch.cat(turned, 1))


@torch.no_grad()
def check_same(model: Drawable, network: Any) -> None:
    """Raises UserError if the network answers otherwise, as it may for parts from outside."""
    denoiser, level = model.denoiser, model.schedule(torch.tensor(0.5))
    x = torch.randn(1, *denoiser.image_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, dtype=torch.long) if denoiser.conditioning.conditional else None
    own = denoiser(x, level, Given(labels)).output
    noise = denoiser.noise_label(level).float()[None] - first_place(model)
    given = network(x, noise, class_labels=labels).sample[:, : len(x[0])]
    if (given - own).abs().max() > CLOSE * (1 + own.abs().max()):
        raise without_counterpart(
            f"the backbone {type(denoiser.backbone).__name__}",
            "with these parts no network of diffusers answers the same",
        )


def check_denoiser(denoiser: Denoiser, of_samples: bool) -> None:
    """Raises UserError if the network hears, is fed or answers what schedulers do not provide."""
    wrong = {
        "this conditioning": (
            denoiser.conditioning.conditional and not denoiser.conditioning.labels.classes,
            "networks of diffusers hear classes, not numbers",
        ),
        "denoiser.self_conditioning=true": (
            denoiser.self_conditioning,
            "no pipeline of diffusers feeds an estimate back to the network",
        ),
        f"denoiser.input_std={denoiser.input_std}": (
            denoiser.input_std is not None,
            "schedulers of diffusers with these levels do not scale the network's input",
        ),
        "augmentation=non_leaky": (
            denoiser.augmentation is not None,
            "networks of diffusers do not hear how an image was augmented",
        ),
        "this objective/loss": (
            denoiser.target is not None or of_samples,
            "pipelines of diffusers walk along means, and this network answers jumps",
        ),
    }
    for option, (applies, reason) in wrong.items():
        if applies:
            raise without_counterpart(option, reason)


def table_of(conditioning: Attributes) -> Tensor:
    """The vector of each label and of the null label, (K + 1, D)."""
    labels = torch.arange(conditioning.labels.classes + 1)
    return conditioning(labels, len(labels)).vector.detach()
