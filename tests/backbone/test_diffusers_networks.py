"""diffusers' networks as backbones; tests/runs/test_to_diffusers.py compares ours with them."""

import sys
from functools import partial

import pytest
import torch
from helpers.compositions import assembled, composed
from helpers.refusals import refused
from helpers.small_networks import inputs_of, randomised
from hydra.utils import instantiate

from diffusion_lab.assembly.model import check_network
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone import DiffusersDiT, DiffusersModel, DiffusersUNet
from diffusion_lab.backbone.conditioning import ClassLabel, Condition, RawLabels
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import Objective, UniformTime
from diffusion_lab.diffusion.objective.loss import AlphaFlow, MeanFlow, Shortcut
from diffusion_lab.diffusion.objective.prediction import Flow
from diffusion_lab.diffusion.schedule import Rectified

NETWORKS = {
    "unet": partial(
        DiffusersUNet,
        channels=16,
        multipliers=[1, 2],
        blocks=1,
        attention=[1],
        head_channels=16,
        norm_groups=4,
        dropout=0.0,
    ),
    "dit": partial(DiffusersDiT, patch=2, width=32, depth=2, heads=2, dropout=0.0),
}
both = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@both
def test_any_vector_is_a_condition_and_none_is_zero(build):
    network = randomised(build(1, 1, (8, 8)))
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    nothing = network(x, noise, Condition())
    vector = torch.zeros(2, network.condition_width)
    torch.testing.assert_close(network(x, noise, Condition(vector)), nothing)
    vector[0, -1] = 1
    changed = (network(x, noise, Condition(vector)) - nothing).abs().mean((1, 2, 3))
    assert changed[0] > 1e-4
    assert changed[1] < 1e-5


@both
def test_labels_are_never_dropped_inside(build):
    model = Denoiser(build, ClassLabel, Flow(), (1, 8, 8), labels=Classes.numbered(3))
    randomised(model).train()
    x, level = torch.randn(4, 1, 8, 8), Rectified()(torch.linspace(0.1, 0.9, 4))
    outputs = [model(x, level, Given(torch.tensor([0, 1, 2, 0]))).output for _ in range(8)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("build", "layer"),
    [(NETWORKS["unet"], "network.time_embedding.linear_1"), (NETWORKS["dit"], "noise.0")],
    ids=NETWORKS,
)
def test_a_thousand_noise_labels_stay_distinct_in_bfloat16(build, layer):
    network = build(1, 1, (8, 8))
    seen = inputs_of(network.get_submodule(layer))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(1000, 1, 8, 8), torch.arange(1000.0), Condition())
    ((embedded,),) = seen
    assert embedded.dtype == torch.float32
    assert len(embedded.unique(dim=0)) == 1000


@pytest.mark.parametrize(("theirs", "ours"), [("diffusers_unet", "unet"), ("diffusers_dit", "dit")])
def test_the_configurations_are_as_large_as_ours(theirs, ours):
    networks = (
        instantiate(composed(None, f"+backbone={name}").backbone)(1, 1, (28, 28))
        for name in (theirs, ours)
    )
    one, other = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert one == other


def test_a_rectangular_image():
    network = randomised(NETWORKS["unet"](1, 2, (8, 12)))
    output = network(torch.randn(2, 1, 8, 12), torch.zeros(2), Condition())
    assert output.shape == (2, 2, 8, 12)
    with refused("head_channels=5", "32 channels", by=ValueError):
        NETWORKS["unet"](1, 1, (8, 8), head_channels=5)
    with refused("8x12", by=ValueError):
        NETWORKS["dit"](1, 2, (8, 12))


@both
def test_without_diffusers_there_is_a_sentence(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused("pip install 'diffusion-lab[diffusers]'", by=ValueError):
        build(1, 1, (8, 8))


@both
def test_mean_flow_is_refused_before_training_and_shortcuts_are_not(build):
    denoiser = Denoiser(
        build, ClassLabel, Flow(), (1, 8, 8), labels=Classes.numbered(3), jumps=True
    )

    def check(loss):
        objective = Objective(Rectified(), Flow(), UniformTime(), loss)
        check_network(denoiser, objective)

    for derived in (MeanFlow(), AlphaFlow()):  # which takes derivatives in the end alone
        with refused("forward-mode", by=ValueError):
            check(derived)
    check(Shortcut())


OWN_SETTINGS = {
    "UNet2DModel": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_class_embeds": 4,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_embeds_ada_norm": 3,
    },
}


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_a_network_with_its_own_settings_hears_labels_that_only_the_conditioning_drops(name):
    build = partial(DiffusersModel, name=name, settings=OWN_SETTINGS[name])
    model = Denoiser(build, RawLabels, Flow(), (1, 8, 8), labels=Classes.numbered(3))
    x, level = torch.randn(3, 1, 8, 8), Rectified()(torch.linspace(0.1, 0.9, 3))
    labels = torch.tensor([0, 2, 3])
    assert not model(x, level, Given(labels)).output.any(), "it starts at 0"
    randomised(model).train()
    outputs = [model(x, level, Given(labels)).output for _ in range(8)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    unlabelled = model(x, level).output
    assert (outputs[0] - unlabelled).abs().amax((1, 2, 3)).gt(1e-5).tolist() == [True, True, False]
    assert len(model.backbone.layers) == (5 if name == "UNet2DModel" else 1)
    assert model.backbone.ends[0].weight.shape[1] == 1
    with refused("raw labels", by=ValueError):
        Denoiser(build, ClassLabel, Flow(), (1, 8, 8), labels=Classes.numbered(3))(
            x, level, Given(labels)
        )


@pytest.mark.parametrize(("classes", "named"), [(None, "class"), (4, "the null label")])
def test_settings_that_do_not_fit_the_labels_are_refused_before_training(classes, named):
    blocks = "[DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]"
    settings = f"block_out_channels: [8, 8], norm_num_groups: 4, down_block_types: {blocks}"
    if classes:
        settings += f", num_class_embeds: {classes}"
    network = ["backbone=diffusers_model", f"backbone.settings={{{settings}}}"]
    cfg = assembled(*network, "conditioning=raw_labels")
    with refused(named, by=ValueError):
        model = build_model(cfg, (1, 8, 8), Classes.numbered(4))
        check_network(model.denoiser, model.objective)
