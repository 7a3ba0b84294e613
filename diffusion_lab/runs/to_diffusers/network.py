"""Denoisers as networks of diffusers, which embed labels themselves."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.backbone import DiffusersModel, DiffusersUNet
from diffusion_lab.backbone.conditioning import Attributes
from diffusion_lab.backbone.diffusers_networks import network_class, settings_of
from diffusion_lab.backbone.unet import UNet
from diffusion_lab.build.model import Drawable
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.runs.to_diffusers.refusal import without_counterpart
from diffusion_lab.runs.to_diffusers.scheduler import first_place
from diffusion_lab.runs.to_diffusers.unet import renamed, settings_of_unet

CLOSE = 1e-4  # largest difference of an output, relative to outputs above 1
TABLE = "class_embedding.weight"  # of a U-Net
REMEDY = (
    "train backbone=unet, diffusers_unet, or diffusers_model with "
    "backbone.name=DiTTransformer2DModel, or leave format out"
)


def network_of(model: Drawable, cfg: DictConfig) -> Any:
    """The network of diffusers that answers as the model's does, in evaluation mode.

    `cfg` is the run's configuration. A null label that was never trained is left out of a U-Net.
    Raises UserError if diffusers has no such network.
    """
    denoiser = model.denoiser
    check_denoiser(denoiser, model.loss.of_samples)
    name, settings, tensors = parts_of(denoiser.backbone, cfg)
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
    if first_place(model):
        count_from_zero(network)
    check_same(model, network.eval())
    return network


def parts_of(backbone: nn.Module, cfg: DictConfig) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class of diffusers that a backbone is, the settings, and the weights under its names."""
    if isinstance(backbone, DiffusersModel | DiffusersUNet):
        name, network = type(backbone.network).__name__, backbone.network
        settings = {key: network.config[key] for key in settings_of(name)}
        return name, settings, network.state_dict()
    if type(backbone) is UNet:
        return "UNet2DModel", settings_of_unet(backbone, cfg), renamed(backbone)
    reason = "diffusers has no network that computes the same"
    if type(backbone).__name__ in ("DiT", "DiffusersDiT"):
        reason = "the DiT of diffusers has other frequencies in its embedding of the noise level"
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
    """Raises UserError if the network hears or is fed more than diffusers' schedulers provide.

    `of_samples` is whether its answer is a sample, and not a mean.
    """
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
