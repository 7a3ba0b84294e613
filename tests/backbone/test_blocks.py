"""The four ways to take a condition, each against its formula."""

from functools import partial

import pytest
import torch
from torch import nn

from diffusion_lab.backbone import DiT
from diffusion_lab.backbone.block import AdaLN, AdaLNZero, CrossAttentionBlock, InContext
from diffusion_lab.backbone.conditioning import Condition

WIDTH = 16
mixer = partial(nn.Linear, WIDTH, WIDTH)
BLOCKS = [AdaLN, AdaLNZero, CrossAttentionBlock, InContext]


def random(block_class, mlp_ratio: float = 2.0):
    torch.manual_seed(0)
    block = block_class(WIDTH, mixer, mlp_ratio)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def layer_norm(x, norm=None):
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return nn.functional.layer_norm(x, (WIDTH,), weight, bias, eps=1e-6)


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 5, WIDTH), Condition(torch.randn(2, WIDTH), torch.randn(2, 3, WIDTH))


@pytest.mark.parametrize("gated", [False, True])
def test_adaln_is_its_formula(gated):
    block, (x, condition) = random(AdaLNZero if gated else AdaLN), inputs()
    of_c = block.modulation(condition.vector).unflatten(1, (2, 3 if gated else 2, WIDTH))
    expected = x
    for branch, c in zip((block.mixer, block.mlp), of_c.unbind(1), strict=True):
        gate = c[:, None, 2] if gated else 1
        expected = expected + gate * branch(
            layer_norm(expected) * (1 + c[:, None, 1]) + c[:, None, 0]
        )
    torch.testing.assert_close(block(x, condition), expected)


def test_in_context_is_a_plain_transformer_block():
    block, (x, condition) = random(InContext), inputs()
    middle = x + block.mixer(layer_norm(x, block.norms[0]))
    expected = middle + block.mlp(layer_norm(middle, block.norms[1]))
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
    assert block.mlp is None
    assert not any("mlp" in name for name in block.state_dict())
    assert block(x, condition).shape == x.shape


@pytest.mark.parametrize("block_class", BLOCKS)
def test_the_network_hands_noise_and_condition_to_the_block(block_class):
    torch.manual_seed(0)
    network = DiT(
        in_channels=1,
        out_channels=1,
        image_size=(8, 8),
        patch=2,
        width=WIDTH,
        depth=2,
        heads=2,
        positions="sincos",
        qk_norm=False,
        window=None,
        long_skips=False,
        block=partial(block_class, mlp_ratio=2.0),
    )
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    noise, (_, condition) = torch.tensor([3.0, 900.0]), inputs()
    network(torch.randn(2, 1, 8, 8), noise, condition)
    embedded = network.noise(noise)
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
