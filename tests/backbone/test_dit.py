"""DiT: its sizes, its initialisation and its patches."""

from functools import partial

import pytest
import torch
from helpers.compositions import composed
from helpers.pairs import first_fast
from helpers.refusals import refused
from helpers.small_networks import inputs_of, outputs_of, randomised, small_dit
from helpers.tiny_runs import QUICK, killed_after_two_steps, require_equal_training, summary_of
from hydra.utils import instantiate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.assembly.costs import ImageFacts, counted
from diffusion_lab.backbone import AdaLNZero, InContext, Mamba
from diffusion_lab.backbone.attention import SelfAttention, rotate
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.backbone.conditioning import ClassLabel, Condition
from diffusion_lab.backbone.embedding import rotary_angles
from diffusion_lab.backbone.mamba import CausalConv, MambaMixer, zigzag_paths
from diffusion_lab.backbone.patches import window_mask
from diffusion_lab.common.labels import Classes
from diffusion_lab.estimate.budget import images_for
from diffusion_lab.training.alignment import chosen_layer

small = small_dit(
    in_channels=1,
    out_channels=1,
    image_size=(8, 12),
    width=32,
    depth=2,
    block=partial(AdaLNZero, mlp_ratio=4.0),
)


@pytest.mark.long
@pytest.mark.parametrize(
    "size",  # a preset, its block, the images and classes, and published parameters and MACs
    first_fast(
        [
            ("dit_xl_2", "in_context", (4, 32, 32), 1000, 452e6, 119.36e9),
            ("dit_xl_2", "cross_attention", (4, 32, 32), 1000, 601e6, 137.61e9),
            ("dit_xl_2", "adaln_zero", (4, 32, 32), 1000, 675e6, 118.62e9),
            ("dit_s_2", "adaln_zero", (3, 32, 32), 10, 32.5e6, 6.05e9),
            ("dit_xl_2", "adaln", (4, 32, 32), 1000, 600e6, 118.55e9),
            ("dit_s_4", "adaln_zero", (3, 32, 32), 10, 32.5e6, 1.41e9),
            ("dit_b_2", "adaln_zero", (3, 32, 32), 10, 129.6e6, 23.0e9),
            ("dit_l_2", "adaln_zero", (3, 32, 32), 10, 457e6, 80.7e9),
        ],
        4,
    ),
)
def test_published_sizes_have_their_parameters_and_macs(size):
    name, block, shape, classes, parameters, macs = size
    cfg = composed(None, f"+backbone={name}", f"backbone/block={block}")
    with torch.device("meta"):
        facts = {"in_channels": shape[0], "out_channels": shape[0], "image_size": shape[1:]}
        network = instantiate(cfg.backbone)(**facts)
        labels = ClassLabel(Classes.numbered(classes), network.condition_width)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *shape), torch.zeros(1), labels(None, 1))
    count = sum(p.numel() for module in (network, labels) for p in module.parameters())
    exact = 0.001 if name == "dit_xl_2" else 0.003  # others are published with fewer digits
    assert count == pytest.approx(parameters, rel=exact)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=exact)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    network = small(width=128)
    block = network.blocks[0]
    for layer in (block.modulation[1], network.modulation[1], network.out):
        assert not layer.weight.any()
    for layer in (network.noise[0], network.noise[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for layer in (network.embed, block.mixer.qkv, block.mixer.out, block.mlp[0], block.mlp[2]):
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier's bound
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not any(m.bias.any() for m in network.modules() if isinstance(m, nn.Linear))


def test_positions_are_fixed_or_learned_and_then_saved():
    for network, learned in ((small(), False), (small(positions="learned"), True)):
        assert network.positions.shape == (24, 32)
        assert network.positions.requires_grad == learned
        assert ("positions" in network.state_dict()) == learned
    assert network.positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_rotary_products_depend_on_the_distance_between_patches_alone():
    angles = rotary_angles(4, 5, 8).view(4, 5, 4)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def product(here, there):
        return (rotate(q, angles[here][None]) * rotate(k, angles[there][None])).sum()

    torch.testing.assert_close(product((0, 0), (2, 1)), product((1, 3), (3, 4)))
    assert not torch.isclose(product((0, 0), (2, 1)), product((0, 0), (1, 2)))
    torch.testing.assert_close(product((3, 2), (3, 2)), (q * k).sum())


def test_a_pair_is_turned_as_a_complex_number():
    x, angle = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([[0.3, 0.7]])
    turned = torch.complex(x[..., :2], x[..., 2:]) * torch.exp(1j * angle)
    torch.testing.assert_close(rotate(x, angle), torch.cat([turned.real, turned.imag], dim=-1))


def test_tokens_without_a_place_are_not_turned():
    x = torch.randn(1, 2, 7, 8)
    turned = rotate(x, rotary_angles(1, 5, 8))
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    torch.testing.assert_close(turned[:, :, 2:], rotate(x[:, :, 2:], rotary_angles(1, 5, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_hides_far_patches_and_no_condition(dtype):
    torch.manual_seed(0)
    mask = window_mask(3, 4, 1)
    assert mask[0].view(3, 4).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    module = SelfAttention(16, 2, mask=mask).to(dtype)
    x = torch.randn(1, 13, 16, dtype=dtype)  # one token without a position, then the 12 patches
    changed = x.clone()
    changed[0, 1 + 11] += 1  # the last corner
    moved = (module(x) != module(changed)).any(-1)[0]
    assert moved[0], "a token without a place sees all patches"
    assert moved[1:].view(3, 4).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    changed = x.clone()
    changed[0, 0] += 1
    assert (module(x) != module(changed)).any(-1).all(), "and is seen by all"


def test_normalised_queries_and_keys_have_unit_scale():
    torch.manual_seed(0)
    plain, normal = SelfAttention(16, 2), SelfAttention(16, 2, qk_norm=True)
    normal.load_state_dict(plain.state_dict(), strict=False)
    large = torch.randn(1, 5, 16)
    with torch.no_grad():
        normal.qkv.weight[:32] *= 100  # queries and keys
    scaled = normal(large)
    with torch.no_grad():
        normal.qkv.weight[:32] /= 10
        normal.qkv.bias[:32] /= 10
    torch.testing.assert_close(normal(large), scaled, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(plain(large), scaled, atol=1e-3)


def test_long_skips_join_the_halves_in_reverse_and_add_nothing_at_first():
    torch.manual_seed(0)
    plain, skipping = small(depth=5), small(depth=5, long_skips=True)
    assert len(skipping.skips) == 2
    for network in (plain, skipping):
        torch.manual_seed(1)
        for parameter in [*network.blocks.parameters(), *network.out.parameters()]:
            nn.init.normal_(parameter, std=0.1)
    skipping.load_state_dict(plain.state_dict(), strict=False)
    image, noise = torch.randn(1, 1, 8, 12), torch.zeros(1)
    torch.testing.assert_close(
        skipping(image, noise, Condition()), plain(image, noise, Condition())
    )
    blocks, skips = outputs_of(*skipping.blocks), inputs_of(*skipping.skips)
    skipping(image, noise, Condition())
    for (seen,), (own, twin) in zip(skips, [(2, 1), (3, 0)], strict=True):
        assert torch.equal(seen, torch.cat([blocks[own], blocks[twin]], dim=-1))


def test_an_overlapping_embedding_sees_the_pixels_around_its_patch():
    torch.manual_seed(0)
    for overlap in (False, True):
        network = small(overlap=overlap)
        embedded = outputs_of(network.embed)
        x = torch.zeros(1, 1, 8, 12, requires_grad=True)
        network(x, torch.zeros(1), Condition())
        tokens = embedded[0].flatten(2).mT if overlap else embedded[0]
        assert tokens.shape == (1, 24, 32)
        # the second patch of the second row: pixels from (2, 2) on
        (seen,) = torch.autograd.grad(tokens[0, 7].sum(), x)
        rows, columns = (seen[0, 0].abs().sum(dim) > 0 for dim in (1, 0))
        around = (1, 5) if overlap else (2, 4)
        assert rows.nonzero()[:, 0].tolist() == list(range(*around))
        assert columns.nonzero()[:, 0].tolist() == list(range(*around))


def test_the_last_convolution_changes_nothing_at_first_and_joins_patches():
    torch.manual_seed(0)
    network = small(smooth=True)
    nn.init.normal_(network.out.weight)
    inputs = torch.randn(1, 1, 8, 12), torch.zeros(1), Condition()
    with torch.no_grad():
        smoothed = network(*inputs)
        smooth, network.smooth = network.smooth, None
        plain = network(*inputs)
        torch.testing.assert_close(plain, smoothed)
        nn.init.constant_(smooth.weight, 1 / 9)
        blurred = smooth(plain)
    torch.testing.assert_close(blurred[0, 0, 1, 1], plain[0, 0, :3, :3].mean())  # three patches
    assert small(smooth=True).ends[-1].kernel_size == (3, 3)  # an end, so Muon leaves it to AdamW


FACTS = {"in_channels": 1, "out_channels": 1, "image_size": 8, "depth": 4}
HALF = {"routed": 0.5, "route": [1, -1]}
dit = small_dit(**FACTS)
mamba = partial(Mamba, **FACTS, width=16, patch=2)
BACKBONES = {
    "dit": dit,
    "rotary": partial(dit, positions="rotary"),
    "in_context": partial(dit, block=InContext, registers=2),
    "fused": partial(dit, fused=True),
    "mamba": mamba,
    "bidirectional": partial(mamba, path="bidirectional", registers=2),
}


def outputs(network: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(3, 1, 8, 8, generator=generator), torch.rand(3, generator=generator)
    tokens = torch.randn(3, 1, 16, generator=generator)
    torch.manual_seed(seed)
    return network(x, noise, Condition(tokens.sum(1), tokens))


@pytest.mark.parametrize("name", BACKBONES)
def test_patches_are_routed_in_training_alone_and_by_the_seed(name):
    routed = randomised(BACKBONES[name](**HALF), 0.25)
    full = outputs(randomised(BACKBONES[name](), 0.25))
    torch.testing.assert_close(outputs(routed.eval()), full, rtol=0, atol=0)
    once = outputs(routed.train())
    torch.testing.assert_close(outputs(routed), once, rtol=0, atol=0)
    assert not torch.equal(outputs(routed, seed=1), once)
    once.square().mean().backward()
    gradients = [p.grad.clone() for p in routed.parameters()]
    assert all(gradient.any() for gradient in gradients)
    routed.zero_grad()
    checkpoint_activations(routed)
    outputs(routed).square().mean().backward()
    torch.testing.assert_close([p.grad for p in routed.parameters()], gradients)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", first_fast(["rotary", "mamba", "dit", "in_context", "bidirectional", "fused"], 2)
)
def test_a_routed_network_is_one_graph(name):
    routed = randomised(BACKBONES[name](**HALF, depth=3))
    compiled = torch.compile(routed, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled), outputs(routed))


@pytest.mark.parametrize("block", [AdaLNZero, InContext])
def test_half_of_the_patches_meets_one_another_alone_and_the_others_stay(block):
    network = randomised(dit(block=block, registers=2, **HALF), 0.25)
    given, answers = inputs_of(*network.blocks), outputs_of(*network.blocks)
    outputs(network)
    before, (short, condition), (after, full) = answers[0], given[1], given[3]
    front = before.shape[1] - 16
    assert front == (4 if block is InContext else 2)
    assert condition.kept.shape == (3, 8)
    assert full.kept is None
    for image, kept in enumerate(condition.kept.tolist()):
        places = [*range(front), *(front + each for each in kept)]
        others = sorted(set(range(front + 16)) - set(places))
        torch.testing.assert_close(short[image], before[image, places])
        torch.testing.assert_close(after[image, places], answers[2][image])
        torch.testing.assert_close(after[image, others], before[image, others])
    assert kept == sorted(kept)


@pytest.mark.parametrize("make", [dit, mamba])
def test_what_leaves_a_fused_route_is_joined_with_what_entered_it(make):
    network = randomised(make(**HALF, fused=True), 0.25)
    left = outputs_of(network.blocks[0], network.blocks[2], network.fusion)
    inside = inputs_of(network.blocks[1])

    def join(full, entered):
        weight = network.fusion.weight
        return full @ weight[:, :16].mT + entered @ weight[:, 16:].mT + network.fusion.bias

    outputs(network)
    entered, short, joined = left
    full = torch.zeros_like(entered)  # the patches that skipped the blocks are 0
    for image, places in enumerate(inside[0][1].kept):
        full[image, places] = short[image]
    torch.testing.assert_close(joined, join(full, entered), atol=1e-4, rtol=0)
    left.clear()
    outputs(network.eval())
    torch.testing.assert_close(left[2], join(left[1], left[0]), atol=1e-4, rtol=0)
    tuned = make(fused=True)
    tuned.load_state_dict(network.state_dict())  # the second stage, of all patches
    torch.testing.assert_close(outputs(tuned), outputs(network), rtol=0, atol=0)


def test_kept_patches_attend_at_their_places_as_if_the_others_were_hidden():
    torch.manual_seed(0)
    angles = rotary_angles(4, 4, 8)
    x, kept = torch.randn(2, 16, 16), torch.tensor([[0, 3, 5, 12], [1, 2, 9, 15]])
    module = randomised(SelfAttention(16, 2, angles=angles), 0.25)
    seen = module(x.gather(1, kept[..., None].expand(-1, -1, 16)), kept)
    for image, places in enumerate(kept):
        hidden = SelfAttention(16, 2, angles=angles, mask=torch.zeros(16, 16, dtype=torch.bool))
        hidden.load_state_dict(module.state_dict())
        hidden.mask[:, places] = True
        torch.testing.assert_close(seen[image], hidden(x[image : image + 1])[0, places])


def test_a_scan_follows_the_kept_patches_along_its_path():
    path = zigzag_paths(4, 4)[3]
    space = partial(CausalConv, size=3)
    placed = randomised(MambaMixer(8, 2, 4, space, path=path), 0.25)
    straight = randomised(MambaMixer(8, 2, 4, space), 0.25)
    x, kept = torch.randn(2, 5, 8), torch.tensor([[0, 3, 5, 12], [1, 2, 9, 15]])  # a register first
    seen = placed(x, kept)
    for image, places in enumerate(kept.tolist()):
        on_path = [each for each in path.tolist() if each in places]
        order = [0, *(1 + places.index(each) for each in on_path)]
        torch.testing.assert_close(seen[image, order], straight(x[image : image + 1, order])[0])


@pytest.mark.long
def test_runs_of_one_seed_route_the_same_patches_and_resume_so(lab, tmp_path):
    routed = [*QUICK, "backbone.depth=3", "backbone.routed=0.5"]
    kept = "callbacks.checkpoint.keep_every_n_steps=2"
    lab.done("train", *routed, kept, "trainer.max_steps=3", "run_dir=whole")
    parts = killed_after_two_steps(tmp_path / "whole")
    lab.done("train", f"resume={parts}")
    require_equal_training(tmp_path / "whole", parts)
    summary = summary_of(tmp_path / "whole")
    assert 2 < summary["forward_passes"] < 3


@pytest.mark.long
def test_a_step_costs_less_and_a_sample_as_much():
    sizes = ["name=x", "backbone=dit", "backbone.width=64", "backbone.heads=1", "backbone.depth=4"]
    facts = ImageFacts((1, 28, 28), Classes.numbered(10))
    plain, half = (
        counted(composed("train", *sizes, f"backbone.routed={share}"), facts) for share in (0, 0.5)
    )
    # of two blocks, 25 of 49 patches: 12 products of 64 x 64 for a token, and 2 x 64 for a pair
    saved = 2 * (24 * 12 * 64**2 + 2 * 64 * (49**2 - 25**2))
    assert half.macs == plain.macs
    assert half.training_share == pytest.approx(1 - saved / plain.macs)
    assert half.passes == pytest.approx(3 * half.training_share)
    fused = counted(composed("train", *sizes, "backbone.fused=true"), facts)
    assert fused.macs - plain.macs == 49 * 2 * 64**2
    data = ["data.source._target_=helpers.tiny_data.TinyData", "backbone.patch=4"]
    cfgs = (composed("train", *sizes, *data, f"backbone.routed={share}") for share in (0, 0.5))
    plain_images, more = (images_for(1e12, cfg, None) for cfg in cfgs)
    assert more > 1.1 * plain_images


@pytest.mark.parametrize(
    "settings", [{"route": [2, 2]}, {"route": [9, 12]}, {"long_skips": True}, {"window": 1}]
)
def test_what_cannot_be_routed_is_refused(settings):
    with refused("routed=0.5", by=ValueError):
        dit(**HALF | settings)
    if "window" in settings:  # all patches go through
        assert dit(fused=True, **settings).blocks[1].mixer.mask is not None
        return
    with refused("fused=true", by=ValueError):
        dit(fused=True, **settings)


def test_a_layer_that_sees_some_patches_is_not_aligned():
    network = dit(**HALF)
    for layer in (1, None):
        with refused("backbone.routed=0.5", by=ValueError):
            chosen_layer(network, layer)
    assert chosen_layer(network, 3) is network.blocks[3]
