"""The requirements on every backbone, and the parts that backbones share."""

import runpy
from dataclasses import replace
from functools import cache, partialmethod

import pytest
import torch
import torch.nn.functional as F
from helpers.compositions import composed
from helpers.held_bytes import saved_bytes
from helpers.pairs import each_once
from helpers.paths import ROOT
from helpers.refusals import refused
from helpers.small_networks import randomised
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.utils import counters

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone.attention import attend
from diffusion_lab.backbone.base import checkpoint_activations, compile_network
from diffusion_lab.backbone.conditioning import ClassLabel, Condition, Unconditional
from diffusion_lab.backbone.embedding import NoiseEmbedding, grid_positions, sinusoid
from diffusion_lab.backbone.norm import GroupNorm, _GroupNorm
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective.prediction import Flow
from diffusion_lab.diffusion.schedule import Rectified

TOKENS = ["backbone.patch=2", "backbone.width=32", "backbone.depth=2"]
DIT = ["backbone=dit", *TOKENS, "backbone.heads=2"]
MAMBA = ["backbone=mamba", *TOKENS, "backbone.state_space.state=4"]
UNET = ["backbone=unet", "backbone.channels=16", "backbone.blocks=1"]
LEVELS = ["backbone.channels=16", "backbone.multipliers=[1,2]", "backbone.attention=[1]"]
BLOCKS = ["adaln_zero", "adaln", "adaln_single", "in_context", "cross_attention"]
CONFIGURED = {
    "unet": [*UNET, *LEVELS, "backbone.stage.head_channels=16"],
    "unet_patch": [
        *UNET,
        "backbone.multipliers=[2]",
        "backbone.attention=[0]",
        "backbone.stage.head_channels=null",
        "backbone.stage.dropout=0.1",
        "backbone.patch=2",
    ],
    "edm2": [
        *("backbone=edm2", *LEVELS),
        *("backbone.head_channels=16", "backbone.bandwidth=0.0025"),
    ],
    **{f"dit_{block}": [*DIT, f"backbone/block={block}"] for block in BLOCKS},
    **{f"mamba_{block}": [*MAMBA, f"backbone/block={block}"] for block in BLOCKS},
    "dit_rotary": [*DIT, "backbone.positions=rotary", "backbone.qk_norm=true"],
    "dit_learned": [*DIT, "backbone.positions=learned", "backbone.window=1"],
    "dit_long_skips": [*DIT, "backbone.long_skips=true", "backbone.depth=3"],
    "dit_smooth": [*DIT, "backbone.overlap=true", "backbone.smooth=true"],
    "dit_in_context_rotary_window": [
        *(*DIT, "backbone/block=in_context"),
        *("backbone.positions=rotary", "backbone.window=2"),
    ],
    "dit_modern": [*DIT, "backbone=dit_modern", "backbone.window=1"],
    "mamba2_modern": [*MAMBA, "backbone=mamba2_modern", "backbone.state_space.head_channels=16"],
    "mamba_mlp": [*MAMBA, "backbone.block.mlp_ratio=2"],
    "mamba_bidirectional": [*MAMBA, "backbone.path=bidirectional"],
    "mamba_raster": [*MAMBA, "backbone.path=raster", "backbone.positions=none"],
    "mamba2": [*MAMBA, "backbone=mamba2", "backbone.state_space.head_channels=16"],
    "diffusers_unet": [
        *("backbone=diffusers_unet", *LEVELS, "backbone.blocks=1"),
        *("backbone.head_channels=16", "backbone.norm_groups=4"),
    ],
    "diffusers_dit": ["backbone=diffusers_dit", *DIT[1:]],
}


@cache
def build(name: str):
    """Returns the factory of a backbone of CONFIGURED."""
    return instantiate(composed("train", *CONFIGURED[name]).backbone)


each = pytest.mark.parametrize("name", CONFIGURED)
LABELS = Given(torch.tensor([0, 1, 2, 3]))


def denoiser(name, conditioning=ClassLabel, **settings) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(
        build(name), conditioning, Flow(), (1, 8, 8), labels=Classes.numbered(3), **settings
    )


def opened(name: str, conditioning=ClassLabel, **settings) -> Denoiser:
    """A denoiser of random weights, none of which is 0."""
    return randomised(denoiser(name, conditioning, **settings))


@cache
def trained(name: str) -> tuple[Denoiser, list[str]]:
    """A denoiser after three steps, and the parameters without a gradient in the last of them.

    Images are constant, a different one for each label.
    """
    model = denoiser(name).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])  # includes the null label
    for _ in range(3):
        x = torch.randn(6, 1, 8, 8, generator=generator)
        level = Rectified()(torch.rand(6, generator=generator))
        optimizer.zero_grad()
        output = model(x, level, Given(labels)).output
        (output - labels[:, None, None, None] + 1).square().mean().backward()
        optimizer.step()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    return model.eval(), without


def inputs(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    level = Rectified()(torch.linspace(0.1, 0.9, batch))
    return torch.randn(batch, 1, 8, 8, generator=generator), level


@each
def test_a_new_network_gives_zero(name):
    x, level = inputs()
    output = denoiser(name)(x, level, LABELS).output
    assert output.shape == x.shape
    assert torch.equal(output, torch.zeros_like(x))


@each
def test_every_network_can_be_told_where_a_step_goes(name):
    model = opened(name, jumps=True).eval()
    nn.init.zeros_(model.target.last.weight)  # as at the start of training
    x, level = inputs()
    ends = [Rectified()(level.t * share) for share in (0.0, 0.5)]
    with torch.no_grad():
        before = [model(x, level.towards(end), LABELS).output for end in ends]
        nn.init.normal_(model.target.last.weight)
        after = [model(x, level.towards(end), LABELS).output for end in ends]
    assert torch.equal(*before)
    changed = (after[0] - after[1]).abs().amax((1, 2, 3))
    assert (changed > 1e-4).all()


@pytest.mark.parametrize(
    ("name", "conditioning"),
    each_once({name: name for name in CONFIGURED}, {"class": ClassLabel, "none": Unconditional}),
)
def test_every_network_hears_what_was_done_to_an_image(name, conditioning):
    model = opened(name, conditioning, augmentation_labels=9).eval()
    x, level = inputs()
    told = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    nothing = model(x, level, LABELS).output
    zeros = torch.zeros_like(told)
    assert torch.equal(model(x, level, replace(LABELS, augmentation=zeros)).output, nothing)
    output = model(x, level, replace(LABELS, augmentation=told)).output
    assert (output - nothing).flatten(1).abs().amax(1).min() > 1e-6
    output.square().sum().backward()
    assert model.augmentation.weight.grad.any(0).all(), "each of the nine values"


@pytest.mark.parametrize("name", ["dit_in_context", "dit_cross_attention", "mamba_in_context"])
def test_blocks_that_read_tokens_hear_it_through_them(name):
    model = denoiser(name, augmentation_labels=9).eval()
    nn.init.normal_(model.backbone.out.weight)
    assert not model.backbone.modulation[1].weight.any(), "the vector is not heard"
    x, level = inputs()
    told = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    difference = model(x, level, Given(augmentation=told)).output - model(x, level).output
    assert difference.flatten(1).abs().amax(1).min() > 1e-4


@each
def test_every_parameter_has_a_gradient_after_two_steps(name):
    # softmax ignores a number added to all scores, so these gradients are rounding or 0
    assert [name for name in trained(name)[1] if not name.endswith("to_k.bias")] == []


@each
def test_a_sample_hears_its_own_label_and_noise_level_and_the_null_label_is_none(name):
    model = opened(name).eval()
    x, level = inputs()
    together = model(x, level, LABELS).output
    alone = [
        model(x[i : i + 1], level[i : i + 1], Given(torch.tensor([i]))).output for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    label = model(x[:1], level[:1], Given(torch.tensor([1]))).output
    noise = model(x[:1], level[3:], Given(torch.tensor([0]))).output
    for other in (label, noise):
        assert (alone[0] - other).abs().mean() > 1e-5  # exactly 0 if one is ignored
    null = model(x, level, Given(torch.full((4,), 3))).output
    assert torch.equal(null, model(x, level).output)


@each
def test_a_network_without_a_condition_works(name):
    model = opened(name, Unconditional)
    assert not any("conditioning" in name for name, _ in model.named_parameters())
    x, level = inputs()
    assert model(x, level).output.abs().sum() > 0


@each
def test_bfloat16_agrees_within_two_per_cent(name):
    model, _ = trained(name)
    x, level = inputs()

    def loss_and_output(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(x, level, LABELS).output
        model.zero_grad()
        loss = (output - 1).square().mean()
        loss.backward()
        return (
            loss.detach(),
            output.detach(),
            torch.cat([p.grad.flatten() for p in model.parameters()]),
        )

    for exact, rounded in zip(loss_and_output(False), loss_and_output(True), strict=True):
        assert rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", [name for name in CONFIGURED if "diffusers" not in name])
@pytest.mark.slow
def test_a_compiled_network_computes_the_same_with_weights_of_the_same_names(name):
    model = opened(name).eval()
    names = list(model.state_dict())
    x, level = inputs()
    plain = model(x, level, LABELS).output
    torch.compiler.reset()  # networks share code, of which PyTorch keeps few compiled versions
    model.backbone.compile(fullgraph=True)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x, level, LABELS).output, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mode", "graphs"),
    # alone, a layer is compiled for one batch size before it is for any
    [("dit_adaln_zero", None, 2), ("dit_adaln_zero", "layers", 3), ("unet_patch", None, 2)],
)
def test_a_compiled_network_has_few_graphs(name, mode, graphs, monkeypatch):
    model = opened(name).eval()
    x, level = inputs()
    plain = model(x, level, LABELS).output
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    compile_network(model.backbone, mode)
    answer = model(x, level, LABELS).output
    answer.sum().backward()
    torch.testing.assert_close(answer, plain)
    for count in (4, 3, 2):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                few = model(x[:count].clone(), level[:count], Given(LABELS.labels[:count])).output
            torch.testing.assert_close(few, plain[:count])
    assert counters["stats"]["unique_graphs"] == graphs


PRESETS = ["unet", "unet_small", "dit", "dit_s_2", "dit_b_4", "mamba", "mamba2", "mamba_s_2"]


@pytest.mark.parametrize(
    ("name", "size"), each_once({name: name for name in PRESETS}, {"28": 28, "32": 32})
)
def test_presets_take_both_usual_image_sizes(name, size):
    cfg = composed(None, f"+backbone={name}")
    with torch.device("meta"):
        network = instantiate(cfg.backbone)(in_channels=1, out_channels=2, image_size=(size, size))
        output = network(torch.zeros(2, 1, size, size), torch.zeros(2), Condition())
    assert output.shape == (2, 2, size, size)


def test_a_thousand_noise_labels_stay_distinct_in_bfloat16():
    torch.manual_seed(0)
    embedding = NoiseEmbedding(256, 64)
    labels = torch.arange(1000).float()
    assert len(sinusoid(labels.bfloat16(), 256).unique(dim=0)) < 1000, "what would be lost"
    with torch.autocast("cpu", torch.bfloat16):
        assert sinusoid(labels, 256).dtype == torch.float32
        assert len(embedding(labels).unique(dim=0)) == 1000


def test_positions_tell_rows_from_columns():
    positions = grid_positions(3, 5, 16).unflatten(0, (3, 5))
    assert len(positions.flatten(0, 1).unique(dim=0)) == 15
    assert torch.equal(positions[0, :, :8], positions[2, :, :8]), "first half: the column"
    assert torch.equal(positions[:, 1, 8:], positions[:, 4, 8:]), "second half: the row"
    assert torch.equal(grid_positions(5, 3, 16).unflatten(0, (5, 3))[4, 2, :8], positions[1, 2, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_scaled_products(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 7, 8, generator=generator)
    k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    expected = ((q @ k.mT) / 8**0.5).softmax(-1) @ v
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(attend(*leaves).float(), expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(attend(*leaves).float(), expected, **tolerance)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_fast_group_norm_and_its_gradients_are_group_norm(silu, shifted):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 4, 24).double() + 2).requires_grad_()
    weight, bias = (torch.randn(24).double().requires_grad_() for _ in range(2))
    shift = torch.randn(2, 24).double().requires_grad_() if shifted else None
    moved = (x + shift[:, None, None] if shifted else x).permute(0, 3, 1, 2)
    expected = F.group_norm(moved, 6, weight, bias, 1e-6).permute(0, 2, 3, 1)
    if silu:
        expected = F.silu(expected)
    result = _GroupNorm.apply(x, shift, weight, bias, 6, 1e-6, silu)
    torch.testing.assert_close(result, expected)
    leaves, cotangent = [x, weight, bias, *([shift] if shifted else [])], torch.randn_like(result)
    ours, theirs = (torch.autograd.grad(y, leaves, cotangent) for y in (result, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_in_bfloat16_agrees_also_with_a_large_mean(silu, layout):
    torch.manual_seed(0)
    module = GroupNorm(32, silu)
    x = torch.randn(2, 32, 28, 28).contiguous(memory_format=layout) + 3
    shift = torch.randn(2, 32)
    exact = F.group_norm(x + shift[:, :, None, None], module.num_groups, eps=module.eps)
    if silu:
        exact = F.silu(exact)
    torch.testing.assert_close(module(x, shift), exact)
    rounded = module(x.bfloat16(), shift).float()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_group_norm_in_bfloat16_takes_a_constant_image():
    # many constants: for some the mean of the square is rounded below the squared mean
    x = torch.linspace(1, 10, 64).bfloat16()[:, None, None, None].repeat(1, 32, 7, 7)
    x.requires_grad_()
    y = GroupNorm(32, silu=True)(x)
    y.sum().backward()
    assert y.abs().max() < 1
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (64, 16), (96, 8), (128, 32), (256, 32)])
def test_groups_have_at_least_four_channels_and_number_at_most_32(channels, groups):
    assert GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize(
    ("channels", "least", "groups"), [(48, 4, 12), (256, 4, 32), (96, 1, 32), (8, 16, 1)]
)
def test_groups_that_are_given_are_fewer_only_where_they_would_be_too_small(
    channels, least, groups
):
    norm = GroupNorm(channels, groups=32, least=least, eps=1e-3)
    assert (norm.num_groups, norm.eps) == (groups, 1e-3)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with refused("groups=5", "32", by=ValueError):
        GroupNorm(32, groups=5)


CHECKPOINTED = {
    "dit": ["backbone=dit", "backbone.width=32", "backbone.heads=2", "backbone.depth=4"],
    "mamba": ["backbone=mamba", "backbone.width=32", "backbone.depth=4"],
    "unet": [
        *("backbone=unet", *LEVELS),
        *("backbone.stage.head_channels=8", "backbone.stage.dropout=0.3"),
    ],
    "edm2": ["backbone=edm2", *LEVELS, "backbone.head_channels=16", "backbone.dropout=0.3"],
    "mlp": ["backbone=mlp", "backbone.width=32", "backbone.depth=4"],
}


def gradients_and_memory(name: str, again: bool) -> tuple[list[torch.Tensor], int]:
    cfg = composed("train", "name=x", *CHECKPOINTED[name], f"activation_checkpointing={again}")
    torch.manual_seed(0)
    model = build_model(cfg, (1, 8, 8), Classes.numbered(4))
    randomised(model.denoiser)  # layers that start at 0 hide the rest
    x0, labels = torch.randn(3, 1, 8, 8), torch.arange(3)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return model.objective(model.denoiser, x0, Given(labels)).minimised.mean()

    memory = saved_bytes(loss, model.denoiser.parameters())
    loss().backward()
    return [p.grad for p in model.denoiser.parameters() if p.grad is not None], memory


@pytest.mark.parametrize("name", CHECKPOINTED)
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
    cfg = OmegaConf.merge(composed("train", "name=x"), {"activation_checkpointing": "auto"})
    with refused("activation_checkpointing='auto'"):
        build_model(cfg, (1, 28, 28), Classes.numbered(10))


pytest.importorskip("diffusers")


@pytest.mark.slow
def test_both_sides_have_the_same_multiply_accumulates():
    benchmark = runpy.run_path(str(ROOT / "experiments/benchmarks/backbones.py"))
    cases = [case for case in benchmark["CASES"].values() if case.library == "diffusers"]
    for case in cases:
        ours, theirs = (benchmark["count_flops"](build, case) for build in (case.ours, case.theirs))
        # diffusers' DiT embeds the noise level anew in each block
        assert theirs == pytest.approx(ours, rel=0.003)
