"""activation_checkpointing: the same gradients from less memory, for every backbone of ours."""

import pytest
import torch
from helpers.compositions import composed
from helpers.held_bytes import saved_bytes
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import Given

SHAPE, CLASSES, COUNT = (1, 8, 8), 4, 3
BACKBONES = {
    "dit": ["width=32", "heads=2", "depth=4"],
    "mamba": ["width=32", "depth=4"],
    "unet": [
        "channels=16",
        "multipliers=[1,2]",
        "attention=[1]",
        "stage.head_channels=8",
        "stage.dropout=0.3",
    ],
    "edm2": [
        "channels=16",
        "multipliers=[1,2]",
        "attention=[1]",
        "head_channels=16",
        "dropout=0.3",
    ],
    "mlp": ["width=32", "depth=4"],
}


def configured(*overrides: str):
    return composed("train", "name=x", *overrides)


def gradients_and_memory(name: str, again: bool) -> tuple[list[torch.Tensor], int]:
    cfg = configured(
        f"backbone={name}",
        *(f"backbone.{setting}" for setting in BACKBONES[name]),
        f"activation_checkpointing={again}",
    )
    torch.manual_seed(0)
    model = build_model(cfg, SHAPE, Classes.numbered(CLASSES))
    for parameter in model.denoiser.parameters():  # layers that start at 0 hide the rest
        torch.nn.init.normal_(parameter, std=0.1)
    x0, labels = torch.randn(COUNT, *SHAPE), torch.arange(COUNT)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return model.objective(model.denoiser, x0, Given(labels)).minimised.mean()

    memory = saved_bytes(loss, model.denoiser.parameters())
    loss().backward()
    return [p.grad for p in model.denoiser.parameters() if p.grad is not None], memory


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_are_the_same_and_less_is_kept(name):
    plain, much = gradients_and_memory(name, False)
    again, little = gradients_and_memory(name, True)
    assert len(plain) == len(again) > 10
    for one, other in zip(plain, again, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)
    assert little < 0.6 * much


def test_a_backbone_without_layers_is_refused():
    with refused("Linear", "activation_checkpointing=false", by=ValueError):
        checkpoint_activations(torch.nn.Linear(1, 1))


def test_other_values_are_refused():
    cfg = OmegaConf.merge(configured(), {"activation_checkpointing": "auto"})
    with refused("activation_checkpointing='auto'"):
        build_model(cfg, (1, 28, 28), Classes.numbered(10))
