"""Token routing: a share of the patches skips blocks in training (TREAD, arXiv:2501.04765)."""

from functools import partial

import pytest
import torch
from helpers.compositions import composed
from helpers.refusals import refused
from helpers.small_networks import small_dit
from helpers.tiny_runs import QUICK, require_equal_training, summary_of
from torch import nn

from diffusion_lab.assembly.costs import ImageFacts, counted
from diffusion_lab.backbone import AdaLNZero, InContext, Mamba
from diffusion_lab.backbone.attention import SelfAttention
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import rotary_angles
from diffusion_lab.backbone.mamba import CausalConv, MambaMixer, zigzag_paths
from diffusion_lab.common.labels import Classes
from diffusion_lab.estimate.budget import images_for
from diffusion_lab.training.alignment import chosen_layer

FACTS = {"in_channels": 1, "out_channels": 1, "image_size": 8, "depth": 4}
HALF = {"routed": 0.5, "route": [1, -1]}
dit = small_dit(**FACTS)
mamba = partial(Mamba, **FACTS, width=16, patch=2)
BACKBONES = {
    "dit": dit,
    "rotary": partial(dit, positions="rotary"),
    "in_context": partial(dit, block=InContext, registers=2),
    "mamba": mamba,
    "bidirectional": partial(mamba, path="bidirectional", registers=2),
}


def randomised(network: nn.Module) -> nn.Module:
    """A network with weights of a fixed seed, none of which is 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return network


def outputs(network: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(3, 1, 8, 8, generator=generator), torch.rand(3, generator=generator)
    tokens = torch.randn(3, 1, 16, generator=generator)
    torch.manual_seed(seed)
    return network(x, noise, Condition(tokens.sum(1), tokens))


@pytest.mark.parametrize("name", BACKBONES)
def test_patches_are_routed_in_training_alone_and_by_the_seed(name):
    routed, plain = randomised(BACKBONES[name](**HALF)), randomised(BACKBONES[name]())
    full = outputs(plain)
    torch.testing.assert_close(outputs(routed.eval()), full, rtol=0, atol=0)
    once = outputs(routed.train())
    torch.testing.assert_close(outputs(routed), once, rtol=0, atol=0)
    assert not torch.equal(outputs(routed, seed=1), once)
    compiled = torch.compile(routed, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled), once)
    once.square().mean().backward()
    gradients = [p.grad.clone() for p in routed.parameters()]
    assert all(gradient.any() for gradient in gradients)
    routed.zero_grad()
    checkpoint_activations(routed)
    outputs(routed).square().mean().backward()
    for parameter, gradient in zip(routed.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("block", [AdaLNZero, InContext])
def test_half_of_the_patches_meets_one_another_alone_and_the_others_stay(block):
    network = randomised(dit(block=block, registers=2, **HALF))
    seen: dict[int, tuple] = {}
    for i, each in enumerate(network.blocks):
        each.register_forward_hook(
            lambda _, inputs, output, i=i: seen.update({i: (*inputs, output)})
        )
    norms = []
    network.norm.register_forward_hook(lambda _, inputs, __: norms.append(inputs[0]))
    outputs(network)
    before, (short, condition, _), after = seen[0][2], seen[1], seen[3][0]
    front = before.shape[1] - 16
    assert front == (4 if block is InContext else 2)
    assert condition.kept.shape == (3, 8)
    assert seen[3][1].kept is None
    for image, kept in enumerate(condition.kept.tolist()):
        places = [*range(front), *(front + each for each in kept)]
        others = sorted(set(range(front + 16)) - set(places))
        torch.testing.assert_close(short[image], before[image, places])
        torch.testing.assert_close(after[image, places], seen[2][2][image])
        torch.testing.assert_close(after[image, others], before[image, others])
    assert kept == sorted(kept)


def test_kept_patches_attend_at_their_places_as_if_the_others_were_hidden():
    torch.manual_seed(0)
    angles = rotary_angles(4, 4, 8)
    x, kept = torch.randn(2, 16, 16), torch.tensor([[0, 3, 5, 12], [1, 2, 9, 15]])
    module = randomised(SelfAttention(16, 2, angles=angles))
    seen = module(x.gather(1, kept[..., None].expand(-1, -1, 16)), kept)
    for image, places in enumerate(kept):
        hidden = SelfAttention(16, 2, angles=angles, mask=torch.zeros(16, 16, dtype=torch.bool))
        hidden.load_state_dict(module.state_dict())
        hidden.mask[:, places] = True
        torch.testing.assert_close(seen[image], hidden(x[image : image + 1])[0, places])


def test_a_scan_follows_the_kept_patches_along_its_path():
    path = zigzag_paths(4, 4)[3]
    space = partial(CausalConv, size=3)
    placed = randomised(MambaMixer(8, 2, 4, space, path=path))
    straight = randomised(MambaMixer(8, 2, 4, space))
    x, kept = torch.randn(2, 5, 8), torch.tensor([[0, 3, 5, 12], [1, 2, 9, 15]])  # a register first
    seen = placed(x, kept)
    for image, places in enumerate(kept.tolist()):
        on_path = [each for each in path.tolist() if each in places]
        order = [0, *(1 + places.index(each) for each in on_path)]
        torch.testing.assert_close(seen[image, order], straight(x[image : image + 1, order])[0])


def test_runs_of_one_seed_route_the_same_patches_and_resume_so(lab, tmp_path):
    routed = [*QUICK, "backbone.depth=3", "backbone.routed=0.5"]
    lab.done("train", *routed, "trainer.max_steps=3", "run_dir=whole")
    lab.done("train", *routed, "trainer.max_steps=2", "run_dir=part")
    lab.done("train", "resume=part", "trainer.max_steps=3")
    require_equal_training(tmp_path / "whole", tmp_path / "part")
    summary = summary_of(tmp_path / "whole")
    assert 2 < summary["forward_passes"] < 3


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
    data = ["data.source._target_=helpers.tiny_data.TinyData", "backbone.patch=4"]
    cfgs = (composed("train", *sizes, *data, f"backbone.routed={share}") for share in (0, 0.5))
    plain_images, more = (images_for(1e12, cfg, None) for cfg in cfgs)
    assert more > 1.1 * plain_images


@pytest.mark.parametrize(
    "settings",
    [{"route": [2, 2]}, {"route": [9, 12]}, {"long_skips": True}, {"window": 1}],
)
def test_what_cannot_be_routed_is_refused(settings):
    with refused("routed=0.5", by=ValueError):
        dit(**HALF | settings)


def test_a_layer_that_sees_some_patches_is_not_aligned():
    network = dit(**HALF)
    for layer in (1, None):
        with refused("backbone.routed=0.5", by=ValueError):
            chosen_layer(network, layer)
    assert chosen_layer(network, 3) is network.blocks[3]
