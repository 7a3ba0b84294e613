"""The ways to take a condition, each against its formula; norms, MLPs and registers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.small_networks import inputs_of, randomised, small_dit
from torch import nn

from diffusion_lab.backbone import (
    AdaLN,
    AdaLNSingle,
    AdaLNZero,
    CrossAttentionBlock,
    DiT,
    InContext,
    Mamba,
)
from diffusion_lab.backbone.conditioning import Condition

WIDTH = 16
mixer = partial(nn.Linear, WIDTH, WIDTH)
BLOCKS = [AdaLN, AdaLNZero, AdaLNSingle, CrossAttentionBlock, InContext]


def random(block_class, mlp_ratio: float = 2.0, **settings):
    return randomised(block_class(WIDTH, mixer, mlp_ratio, **settings), 0.3)


def layer_norm(x, norm=None):
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return nn.functional.layer_norm(x, (WIDTH,), weight, bias, eps=1e-6)


def rms_norm(x, norm=None):
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x if norm is None else x * norm.weight


def inputs():
    torch.manual_seed(1)
    x, vector, tokens = (torch.randn(2, n, WIDTH) for n in (5, 1, 3))
    return x, Condition(vector[:, 0], tokens, modulation=torch.randn(2, 6 * WIDTH))


def network(block_class, **settings) -> DiT:
    torch.manual_seed(0)
    return small_dit(block_class, depth=2)(1, 1, (8, 8), **settings)


NORMS = pytest.mark.parametrize(("norm", "formula"), [("layer", layer_norm), ("rms", rms_norm)])


@NORMS
@pytest.mark.parametrize("gated", [False, True])
def test_adaln_is_its_formula(gated, norm, formula):
    block, (x, condition) = random(AdaLNZero if gated else AdaLN, norm=norm), inputs()
    of_c = block.modulation(condition.vector).unflatten(1, (2, 3 if gated else 2, WIDTH))
    expected = x
    for branch, c in zip((block.mixer, block.mlp), of_c.unbind(1), strict=True):
        gate = c[:, None, 2] if gated else 1
        expected = expected + gate * branch(formula(expected) * (1 + c[:, None, 1]) + c[:, None, 0])
    torch.testing.assert_close(block(x, condition), expected)


def test_adaln_single_adds_its_table_to_what_all_blocks_share():
    block, zero, (x, condition) = random(AdaLNSingle), random(AdaLNZero), inputs()
    zero.load_state_dict(block.state_dict(), strict=False)
    nn.init.zeros_(zero.modulation[1].weight)
    assert block.shared == len(zero.modulation[1].bias) == 6 * WIDTH
    condition = replace(condition, modulation=condition.modulation[:1].repeat(2, 1))
    zero.modulation[1].bias.data = block.table.data + condition.modulation[0]
    torch.testing.assert_close(block(x, condition), zero(x, condition))


@NORMS
def test_in_context_is_a_plain_transformer_block(norm, formula):
    block, (x, condition) = random(InContext, norm=norm), inputs()
    middle = x + block.mixer(formula(x, block.norms[0]))
    expected = middle + block.mlp(formula(middle, block.norms[1]))
    torch.testing.assert_close(block(x, condition), expected)
    assert torch.equal(block(x, condition), block(x, Condition()))
    assert block.prepends


def test_cross_attention_stands_between_mixer_and_mlp():
    block, (x, condition) = random(CrossAttentionBlock), inputs()
    middle = x + block.mixer(layer_norm(x, block.norms[0]))
    middle = middle + block.cross(layer_norm(middle, block.norms[1]), condition.tokens)
    expected = middle + block.mlp(layer_norm(middle, block.norms[2]))
    torch.testing.assert_close(block(x, condition), expected)


def test_cross_attention_is_pytorchs():
    block, (x, condition) = random(CrossAttentionBlock).cross, inputs()
    theirs = nn.MultiheadAttention(WIDTH, block.heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.q.weight, block.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.q.bias, block.kv.bias]))
        theirs.out_proj.load_state_dict(block.out.state_dict())
    expected, _ = theirs(x, condition.tokens, condition.tokens)
    torch.testing.assert_close(block(x, condition.tokens), expected)


@pytest.mark.parametrize(("width", "heads"), [(1152, 18), (384, 6), (96, 1), (200, 2), (16, 1)])
def test_heads_of_cross_attention_have_at_least_64_channels_where_they_can(width, heads):
    with torch.device("meta"):
        assert CrossAttentionBlock(width, nn.Identity, 0.0).cross.heads == heads


@pytest.mark.parametrize("block_class", BLOCKS)
def test_without_an_mlp_there_is_one_branch_less(block_class):
    block, (x, condition) = random(block_class, mlp_ratio=0.0), inputs()
    condition = replace(condition, modulation=condition.modulation[:, : 3 * WIDTH])
    assert block.mlp is None
    assert not any("mlp" in name for name in block.state_dict())
    assert block(x, condition).shape == x.shape


@pytest.mark.parametrize("block_class", BLOCKS)
def test_the_network_hands_noise_and_condition_to_the_block(block_class):
    dit = network(block_class)
    seen = inputs_of(*dit.blocks)
    noise, (_, condition) = torch.tensor([3.0, 900.0]), inputs()
    dit(torch.randn(2, 1, 8, 8), noise, condition)
    embedded = dit.noise(noise)
    context = torch.cat([embedded[:, None], condition.tokens], dim=1)
    for tokens, given in seen:
        torch.testing.assert_close(given.vector, embedded + condition.vector)
        torch.testing.assert_close(given.tokens, context)
        assert tokens.shape[1] == 16 + (4 if block_class is InContext else 0)
    if block_class is InContext:
        torch.testing.assert_close(seen[0][0][:, :4], context)


@pytest.mark.parametrize("block_class", BLOCKS)
@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_the_mlp_has_the_activation_that_is_asked_for(block_class, activation, approximate):
    block = block_class(WIDTH, mixer, 2.0, activation)
    x = torch.randn(2, 5, WIDTH)
    hidden = nn.functional.gelu(block.mlp[0](x), approximate=approximate)
    torch.testing.assert_close(block.mlp(x), block.mlp[2](hidden), rtol=0, atol=1e-7)


@pytest.mark.parametrize("block_class", BLOCKS)
def test_swiglu_is_its_formula_and_has_as_many_parameters(block_class):
    block = random(block_class, mlp_ratio=3.0, activation="swiglu")
    x = torch.randn(2, 5, WIDTH)
    gate, value = block.mlp.inner(x).split(2 * WIDTH, dim=-1)
    torch.testing.assert_close(block.mlp(x), block.mlp.outer(gate * gate.sigmoid() * value))
    plain = random(block_class, mlp_ratio=3.0).mlp
    weights, others = (
        sum(p.numel() for p in mlp.parameters() if p.ndim == 2) for mlp in (block.mlp, plain)
    )
    assert weights == others


def test_one_layer_makes_the_modulation_of_all_blocks():
    single, zero = network(AdaLNSingle), network(AdaLNZero)
    shared = single.shared_modulation
    assert zero.shared_modulation is None
    assert [*shared[1].weight.shape] == [6 * WIDTH, WIDTH]
    assert not shared[1].weight.any()
    nn.init.normal_(shared[1].weight)
    seen = inputs_of(*single.blocks)
    noise = torch.tensor([3.0, 900.0])
    single(torch.randn(2, 1, 8, 8), noise, Condition())
    for _, given in seen:
        torch.testing.assert_close(given.modulation, shared(single.noise(noise)))


@pytest.mark.parametrize("block_class", [AdaLNZero, InContext])
def test_registers_go_before_all_other_tokens_and_are_left_out_of_the_image(block_class):
    dit, (_, condition) = network(block_class, registers=3), inputs()
    assert 0.01 < dit.registers.std() < 0.03
    seen = inputs_of(dit.blocks[0])
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    assert dit(x, noise, condition).shape == x.shape
    ((tokens, _),) = seen
    assert tokens.shape[1] == 3 + 16 + (4 if block_class is InContext else 0)
    assert torch.equal(tokens[:, :3], dit.registers.expand(2, -1, -1))
    del dit.registers
    dit.registers = None
    dit(x, noise, condition)
    assert torch.equal(seen[1][0], tokens[:, 3:])


def test_a_scan_begins_with_the_registers():
    paths = []

    class Space(nn.Module):
        def __init__(self, channels: int):
            super().__init__()

        def forward(self, x):
            paths.append(x)
            return x

    sizes = {"patch": 2, "width": WIDTH, "depth": 2, "expand": 2, "conv": 2, "registers": 3}
    parts = {"path": "zigzag", "positions": "sincos", "long_skips": False, "state_space": Space}
    block = partial(AdaLNZero, mlp_ratio=0.0)
    mamba = Mamba(1, 1, (8, 8), **sizes, **parts, block=block)
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    mamba(x, noise, Condition())
    before = [path[:, :2] for path in paths]  # of the convolution of two tokens
    mamba(x + 1, noise, Condition())
    assert all(path.shape[1] == 19 for path in paths)
    for path, other in zip(before, paths[2:], strict=True):
        assert torch.equal(path, other[:, :2])
        assert not torch.equal(paths[0][:, 3:], paths[2][:, 3:])
