"""Small networks, untrained, and what is asked of their modules."""

from functools import partial

import torch
from torch import nn

from diffusion_lab.backbone import AdaLNZero, Block, DiT

FIXED = {"positions": "sincos", "qk_norm": False, "window": None, "long_skips": False}


def small_dit(block: type[Block] | partial = AdaLNZero, **settings: object) -> partial:
    """Makes a DiT of width 16 and one block on patches of 2 x 2 pixels, unless told otherwise."""
    sizes = {"patch": 2, "width": 16, "depth": 1, "heads": 2}
    return partial(DiT, **sizes | FIXED | {"block": partial(block, mlp_ratio=2.0)} | settings)


def randomised(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Draws all weights of a module anew, from a fixed seed, so that none is 0; returns it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


def inputs_of(*modules: nn.Module) -> list[tuple]:
    """A list to which every call of these modules adds its inputs."""
    seen: list[tuple] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    return seen


def outputs_of(*modules: nn.Module) -> list:
    """A list to which every call of these modules adds its output."""
    seen: list = []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: seen.append(output))
    return seen
