"""Backbones: networks from noisy images and a noise label to an output of the images' size."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_lab.backbone.conditioning import Condition

Size = int | tuple[int, int]  # height and width of an image; a number is both


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides of an image."""
    return (size, size) if isinstance(size, int) else size


class Backbone(Protocol):
    """The interface of a network that can be trained here.

    A backbone is configured as a factory: `Denoiser` calls it with the facts `in_channels`,
    `out_channels` and `image_size` (height, width); everything else is set in its YAML.
    """

    condition_width: int  # D of the vectors and tokens in a Condition

    # A backbone may have a property `layers`, the modules that it calls one after another: FSDP
    # gathers one of them at a time, and activation_checkpointing computes them again.
    # It may have a property `ends`, the layers that read the image and write the output, which
    # Muon leaves to AdamW.
    # A module of it may have a property `rates`: factors of Adam's learning rate, by parameter.
    # It may have `embeds_labels = True`: it takes `condition.labels` of conditioning=raw_labels.
    # It may have a method `adapt`, which is called with the conditioning and may change it, and its
    # modules may have a method `renormalise`.

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W)."""


def initialise(network: nn.Module) -> None:
    """Gives a network Xavier's weights and biases of 0, where its modules make no exception.

    A module makes exceptions in a method `initialise`, called from the outermost module inwards.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if exceptions := getattr(module, "initialise", None):
            exceptions()


def keeping_magnitude(network: nn.Module) -> list[Any]:
    """The modules of a network that put their weights back to a magnitude which they keep.

    After the weights were changed, by a method `renormalise`, with which they stay bit for bit as
    they are if its argument, a bool () on their device, is true.
    """
    return [module for module in network.modules() if hasattr(module, "renormalise")]


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The modules of a backbone that are called one after another; none if it names none."""
    layers = getattr(backbone, "layers", ())
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def compile_network(network: nn.Module, mode: str | None, dynamic: bool | None = None) -> None:
    """Compiles a network in place, in a mode of torch.compile, or None for its default.

    With `layers`, each layer is compiled by itself: equal ones share a graph, so that a deep
    network is compiled in a fraction of the time. A network that names none is compiled whole.
    """
    parts = layers_of(network) if mode == "layers" else []
    if parts:  # those of a class share a limit, of 8, after which they would stay as they are
        known = torch._dynamo.config
        known.recompile_limit = max(known.recompile_limit, 8 * len(parts))
    for part in parts or [network]:
        part.compile(dynamic=dynamic, mode=None if mode == "layers" else mode)


def ends_of(backbone: nn.Module) -> list[nn.Module]:
    """The first and the last layer of a backbone; none if it names none."""
    return list(getattr(backbone, "ends", ()))


def checkpoint_activations(backbone: nn.Module) -> None:
    """Keeps only the inputs of a backbone's layers for the backward pass, which runs them again.

    Gradients are the same, with the same dropout (arXiv:1604.06174). Raises ValueError if the
    backbone names no layers.
    """
    if not layers_of(backbone):
        raise ValueError(
            "activation_checkpointing=true needs a backbone with a property `layers`, and "
            f"{type(backbone).__name__} has none; write activation_checkpointing=false"
        )
    for layer in layers_of(backbone):
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable) -> Callable:
    def run(*inputs, **named):
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run
