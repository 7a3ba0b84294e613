"""DiT: its sizes, its initialisation and its patches."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.backbone import DiT
from diffusion_lab.backbone.block import AdaLNZero
from diffusion_lab.backbone.dit import patchify, unpatchify
from diffusion_lab.conditioning import ClassLabel, Condition

CONF = Path(__file__).parent.parent / "conf"
small = partial(
    DiT,
    in_channels=1,
    out_channels=1,
    image_size=(8, 12),
    patch=2,
    width=32,
    depth=2,
    heads=2,
    block=partial(AdaLNZero, mlp_ratio=4.0),
)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters", "macs"),
    [
        ("dit_s_2", (3, 32, 32), 10, 32.5e6, 6.05e9),
        ("dit_s_4", (3, 32, 32), 10, 32.5e6, 1.41e9),
        ("dit_b_2", (3, 32, 32), 10, 129.6e6, 23.0e9),
        ("dit_l_2", (3, 32, 32), 10, 457e6, 80.7e9),
        ("dit_xl_2", (4, 32, 32), 1000, 675e6, 118.62e9),
    ],
)
def test_published_sizes_have_their_parameters_and_macs(name, shape, classes, parameters, macs):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=[f"+backbone={name}"])
    with torch.device("meta"):
        facts = {"in_channels": shape[0], "out_channels": shape[0], "image_size": shape[1:]}
        network = instantiate(cfg.backbone)(**facts)
        labels = ClassLabel(classes, network.condition_width)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *shape), torch.zeros(1), Condition())
    count = sum(p.numel() for module in (network, labels) for p in module.parameters())
    assert count == pytest.approx(parameters, rel=0.003)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.003)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    network = small(width=128)
    block = network.blocks[0]
    for layer in (block.modulation[1], network.modulation[1], network.out):
        assert not layer.weight.any()
    for layer in (network.noise[0], network.noise[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for layer in (network.embed, block.mixer.qkv, block.mixer.out, block.mlp[0], block.mlp[2]):
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier's
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not any(m.bias.any() for m in network.modules() if isinstance(m, nn.Linear))


def test_a_new_block_is_the_identity():
    x = torch.randn(2, 5, 32)
    condition = Condition(vector=torch.randn(2, 32))
    for block in small().blocks:
        assert torch.equal(block(x, condition), x)


@pytest.mark.parametrize("branch", [0, 1], ids=["mixer", "mlp"])
def test_an_opened_gate_lets_its_modulated_branch_through(branch):
    block = small().blocks[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():  # shift 1, scale 2, gate 3
        bias = block.modulation[1].bias.view(2, 3, 32)[branch]
        bias.copy_(torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 32))
    module = (block.mixer, block.mlp)[branch]
    torch.testing.assert_close(
        block(x, Condition(vector=torch.ones(2, 32))), x + 3 * module(3 * block.norm(x) + 1)
    )


def test_positions_are_fixed_and_not_saved():
    network = small()
    assert "positions" not in network.state_dict()
    assert network.positions.shape == (24, 32)
    assert not network.positions.requires_grad


def test_positions_are_what_tells_the_patches_apart():
    torch.manual_seed(0)
    network = small(image_size=(8, 8), patch=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    image = torch.randn(1, 1, 8, 8)
    flipped = torch.cat(image.split(4, dim=2)[::-1], dim=2)  # the rows of patches swapped
    call = partial(network, noise=torch.zeros(1), condition=Condition())
    unflip = torch.cat(call(flipped).split(4, dim=2)[::-1], dim=2)
    assert not torch.allclose(unflip, call(image), atol=1e-3)
    network.positions.zero_()
    unflip = torch.cat(call(flipped).split(4, dim=2)[::-1], dim=2)
    torch.testing.assert_close(unflip, call(image))


def test_patches_are_blocks_of_pixels_row_by_row():
    image = torch.arange(2 * 3 * 8 * 12).float().view(2, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], image[1, :, 4:8, 4:8].flatten())
    assert torch.equal(unpatchify(patches, 4, rows=2), image)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"patch": 3}, "patches of 3 do not tile a 8x12 image"),
        ({"heads": 5}, "5 heads do not divide a width of 32"),
        ({"width": 34}, "backbone.width=34 is not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_get_a_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**override)
