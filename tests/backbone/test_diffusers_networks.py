"""diffusers' networks as backbones, and ours against them with the same weights."""

import sys
from functools import partial

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import Timesteps
from helpers.compositions import assembled, composed
from helpers.refusals import refused
from hydra.utils import instantiate
from torch import nn

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


def configured(name: str, *overrides: str, image_size=(8, 8), in_channels=3, out_channels=3):
    """Builds the network of a configuration, with overrides as on the command line."""
    cfg = composed(None, f"+backbone={name}", *overrides)
    return instantiate(cfg.backbone)(in_channels, out_channels, image_size)


def randomised(network: nn.Module) -> nn.Module:
    """Sets all parameters to random values, also those that start at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


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
    seen = []
    network.get_submodule(layer).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(1000, 1, 8, 8), torch.arange(1000.0), Condition())
    assert seen[0].dtype == torch.float32
    assert len(seen[0].unique(dim=0)) == 1000


@pytest.mark.parametrize(("theirs", "ours"), [("diffusers_unet", "unet"), ("diffusers_dit", "dit")])
def test_the_configurations_are_as_large_as_ours(theirs, ours):
    shape = {"image_size": (28, 28), "in_channels": 1, "out_channels": 1}
    sizes = [sum(p.numel() for p in configured(n, **shape).parameters()) for n in (theirs, ours)]
    assert sizes[0] == sizes[1]


def test_a_rectangular_image():
    network = randomised(NETWORKS["unet"](1, 2, (8, 12)))
    output = network(torch.randn(2, 1, 8, 12), torch.zeros(2), Condition())
    assert output.shape == (2, 2, 8, 12)
    with refused("8x12", by=ValueError):
        NETWORKS["dit"](1, 2, (8, 12))


@both
def test_without_diffusers_there_is_a_sentence(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused("pip install 'diffusion-lab[diffusers]'", by=ValueError):
        build(1, 1, (8, 8))


def layers(theirs: dict, ours: str, *names: str) -> dict:
    """Returns weight and bias of `ours` from one layer of theirs, or from several, stacked."""
    parts = ("weight", "bias")
    return {f"{ours}.{p}": torch.cat([theirs[f"{name}.{p}"] for name in names]) for p in parts}


def attention(theirs: dict, ours: str, name: str) -> dict:
    """Returns SelfAttention's weights from Attention's."""
    return {
        **layers(theirs, f"{ours}.qkv", *(f"{name}.to_{part}" for part in "qkv")),
        **layers(theirs, f"{ours}.out", f"{name}.to_out.0"),
    }


def dit_weights(theirs: dict, depth: int, channels: int) -> dict:
    """Returns the weights of DiTTransformer2DModel under our names."""
    embedder = "transformer_blocks.0.norm1.emb.timestep_embedder"
    weights = {
        "embed.weight": theirs["pos_embed.proj.weight"].flatten(1),
        "embed.bias": theirs["pos_embed.proj.bias"],
        **layers(theirs, "noise.0", f"{embedder}.linear_1"),
        **layers(theirs, "noise.2", f"{embedder}.linear_2"),
        **layers(theirs, "modulation.1", "proj_out_1"),
    }
    for part in ("weight", "bias"):  # pixels of a patch: theirs (p p C), ours (C p p)
        pixels = theirs[f"proj_out_2.{part}"].unflatten(0, (-1, channels))
        weights[f"out.{part}"] = pixels.transpose(0, 1).flatten(0, 1)
    for i in range(depth):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        weights |= attention(theirs, f"{ours}.mixer", f"{block}.attn1")
        weights |= layers(theirs, f"{ours}.modulation.1", f"{block}.norm1.linear")
        weights |= layers(theirs, f"{ours}.mlp.0", f"{block}.ff.net.0.proj")
        weights |= layers(theirs, f"{ours}.mlp.2", f"{block}.ff.net.2")
    return weights


def unet_weights(theirs: UNet2DModel) -> dict:
    """Returns the weights of UNet2DModel under our names."""
    state = theirs.state_dict()
    modules = dict(theirs.named_modules())
    weights = {
        **layers(state, "entry", "conv_in"),
        **layers(state, "noise.0", "time_embedding.linear_1"),
        **layers(state, "noise.2", "time_embedding.linear_2"),
        **layers(state, "norm", "conv_norm_out"),
        **layers(state, "out", "conv_out"),
    }

    def residual(ours: str, name: str) -> dict:
        pairs = {"conv_shortcut": "skip", "time_emb_proj": "embedding"}
        pairs |= {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
        return {
            key: value
            for their_part, our_part in pairs.items()
            if f"{name}.{their_part}.weight" in state
            for key, value in layers(state, f"{ours}.{our_part}", f"{name}.{their_part}").items()
        }

    def level(name: str, stages: list[str], resampled: str) -> dict:
        """Maps a level: stages of a residual block and attention, and a change of resolution."""
        found = {}
        for i, stage in enumerate(stages):
            found |= residual(f"{stage}.residual", f"{name}.resnets.{i}")
            if f"{name}.attentions" in modules:
                attend, target = f"{name}.attentions.{i}", f"{stage}.attention"
                found |= layers(state, f"{target}.norm", f"{attend}.group_norm")
                found |= attention(state, f"{target}.attention", attend)
        for resampler in ("downsamplers.0", "upsamplers.0"):
            if f"{name}.{resampler}.conv" in modules:
                found |= layers(state, f"{resampled}.module", f"{name}.{resampler}.conv")
            elif f"{name}.{resampler}" in modules:
                found |= residual(f"{resampled}.residual", f"{name}.{resampler}")
        return found

    index = 0
    for i, block in enumerate(theirs.down_blocks):
        stages = [f"down.{index + j}" for j in range(len(block.resnets))]
        index += len(stages) + 1
        weights |= level(f"down_blocks.{i}", stages, f"down.{index - 1}")
    for i, block in enumerate(theirs.up_blocks):
        stages = [f"up.{i}.stages.{j}" for j in range(len(block.resnets))]
        weights |= level(f"up_blocks.{i}", stages, f"up.{i}.upsample")
    for i in range(2):
        weights |= residual(f"middle.{i}.residual", f"mid_block.resnets.{i}")
    weights |= layers(state, "middle.0.attention.norm", "mid_block.attentions.0.group_norm")
    return weights | attention(state, "middle.0.attention.attention", "mid_block.attentions.0")


@pytest.mark.parametrize(
    ("plain", "settings", "overrides"),
    [
        (["DownBlock2D", "UpBlock2D"], {}, []),
        (
            ["ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"],
            {
                "downsample_type": "resnet",
                "upsample_type": "resnet",
                "resnet_time_scale_shift": "scale_shift",
            },
            ["backbone/resample=block", "backbone/stage=adm"],
        ),
    ],
    ids=["ddpm", "adm"],
)
def test_our_unet_is_theirs(plain, settings, overrides):
    """Compares UNet2DModel with all weights random to ours with the same weights, in float32."""
    theirs = UNet2DModel(
        in_channels=3,
        out_channels=6,
        block_out_channels=[32, 64, 64],
        layers_per_block=2,
        down_block_types=[plain[0], "AttnDownBlock2D", plain[0]],
        up_block_types=[plain[1], "AttnUpBlock2D", plain[1]],
        attention_head_dim=16,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        norm_eps=1e-6,
        class_embed_type="identity",
        **settings,
    ).eval()
    randomised(theirs)
    overrides = ["backbone.attention=[1]", "backbone.stage.head_channels=16", *overrides]
    ours = configured("unet", *overrides, image_size=(8, 12), out_channels=6)
    for module in ours.modules():  # ours has at least four channels a group
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 8
    ours.load_state_dict(unet_weights(theirs))
    x, noise = torch.randn(3, 3, 8, 12), torch.tensor([0.0, 37.5, 999.0])
    vector = torch.randn(3, ours.condition_width)
    expected = theirs(x, noise, vector).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, noise, Condition(vector)), expected, rtol=0, atol=1e-5)


def test_our_dit_is_theirs():
    """Compares DiTTransformer2DModel with all weights random to ours with the same, in float32.

    diffusers is configured with the exact GELU and the paper's epsilon. Two tables of constants are
    made equal: diffusers' noise frequencies end at 1 / 10000 and the paper's, like ours, one before
    it; and ours has cosines before sines in the positions of patches, the paper and diffusers sines
    first.
    """
    depth, width, channels, side = 3, 64, 3, 12
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=depth,
        sample_size=side,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    randomised(theirs)
    embedding = theirs.transformer_blocks[0].norm1.emb
    embedding.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    for block in theirs.transformer_blocks:
        block.norm1.emb = embedding  # one as in the paper, where diffusers has one per block
    overrides = [
        f"backbone.{key}={value}"
        for key, value in {"patch": 2, "width": width, "depth": depth, "heads": 4}.items()
    ]
    shape = {"in_channels": channels, "out_channels": 2 * channels, "image_size": (side, side)}
    ours = configured("dit", *overrides, **shape)
    ours.load_state_dict(dit_weights(theirs.state_dict(), depth, 2 * channels))
    positions = theirs.pos_embed.pos_embed[0]
    sines_first = positions.unflatten(1, (2, 2, -1)).flip(2).flatten(1)
    torch.testing.assert_close(ours.positions, sines_first, rtol=0, atol=1e-6)
    ours.positions.copy_(positions)

    x, noise = torch.randn(5, channels, side, side), torch.tensor([0.0, 1.0, 37.5, 500.0, 999.0])
    labels = torch.tensor([0, 3, 9, 10, 10])  # 10 is the null label
    condition = Condition(embedding.class_embedder.embedding_table(labels))
    expected = theirs(x, noise, labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, noise, condition), expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("setting", ["layers", "in_channels", "sample_size"])
def test_a_setting_that_a_network_does_not_have_is_refused(setting):
    with refused(setting, by=ValueError):
        DiffusersModel(1, 1, (8, 8), "UNet2DModel", {setting: 3})
