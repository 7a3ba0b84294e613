"""DDPM's U-Net: its size, its levels and its upsampling."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.backbone import UNet
from diffusion_lab.backbone.unet import AttentionBlock, ResidualBlock, Upsample
from diffusion_lab.conditioning import Condition

small = partial(
    UNet,
    in_channels=1,
    out_channels=1,
    image_size=(28, 28),
    channels=16,
    multipliers=[1, 2, 2],
    blocks=1,
    attention=[1],
    head_channels=16,
    dropout=0.0,
    patch=1,
)


def test_ddpm_for_cifar_has_its_parameters_and_macs():
    with torch.device("meta"):
        network = UNet(3, 3, (32, 32), 128, [1, 2, 2, 2], 2, [1], None, 0.1, 1)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32), torch.zeros(1), Condition())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == pytest.approx(35.7e6, rel=0.005)
    assert counter.get_total_flops() / 2 == pytest.approx(6.22e9, rel=0.005)


def test_attention_is_where_it_is_asked_for():
    network = small(attention=[0, 2], blocks=2)
    sizes = []
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[-1]))
    network(torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    # two blocks down and three up at levels 0 and 2, and one in the middle
    assert sizes == [28, 28, 7, 7, 7, 7, 7, 7, 28, 28, 28]


def test_a_residual_block_starts_as_nothing_but_its_skip():
    block = next(m for m in small().modules() if isinstance(m, ResidualBlock))
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x, torch.randn(2, 64)), x)


def test_attention_starts_as_nothing_added():
    block = next(m for m in small().modules() if isinstance(m, AttentionBlock))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_upsampling_repeats_pixels_before_it_convolves():
    up = Upsample(2)
    with torch.no_grad():
        up.weight.zero_()
        up.weight[[0, 1], [0, 1], 1, 1] = 1  # the identity
    x = torch.randn(1, 2, 3, 4)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), expected + up.bias[:, None, None])


def test_dropout_is_for_training_only():
    network = small(dropout=0.5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    call = partial(network, torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    assert not torch.equal(call(), call())
    network.eval()
    assert torch.equal(call(), call())


def test_a_rectangular_image_in_patches():
    network = small(image_size=(24, 16), multipliers=[1, 2], patch=4)
    assert network.entry.in_channels == 16
    assert network(torch.randn(2, 1, 24, 16), torch.zeros(2), Condition()).shape == (2, 1, 24, 16)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"multipliers": [1, 2, 2, 2]}, "at most 3 backbone.multipliers"),
        ({"patch": 8}, "blocks of 8x8 pixels do not tile a 28x28 image"),
        ({"patch": 2}, "at most 2 backbone.multipliers"),
        ({"attention": [3]}, "names level 3, and this U-Net has levels 0 to 2"),
        ({"channels": 18}, "backbone.channels=18 is not a multiple of 4"),
        ({"head_channels": 24}, "heads of 24 channels do not divide a level of 32"),
    ],
)
def test_sizes_that_do_not_fit_get_a_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**override)
