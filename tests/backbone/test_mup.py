"""muP: networks of all widths train alike at one learning rate (arXiv:2203.03466, 2505.15270)."""

from functools import partial

import pytest
import torch
from helpers.refusals import refused
from helpers.small_networks import small_dit
from torch import Tensor, nn

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.parameter_groups import OptimizerFactory, inner_matrices
from diffusion_lab.backbone.base import ends_of
from diffusion_lab.backbone.conditioning import ClassLabel, Condition, NumericLabel
from diffusion_lab.common.labels import Classes, Numbers
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective.prediction import Flow
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.training.optimizer import Muon

WIDTHS = (64, 512)
STEPS = 4
ADAM = {"lr": 3e-3, "weight_decay": 0.1}
MUON = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "betas": (0.9, 0.99), "eps": 1e-8}
small = small_dit(in_channels=1, out_channels=1, image_size=8, patch=4)


def adam(parameters):
    return torch.optim.AdamW(parameters, **ADAM)


def muon(parameters, scale: str):
    lr = {"original": 0.02, "match_rms_adamw": 3e-3}[scale]
    return Muon(parameters, lr, 3e-3, 0.1, adjust_lr_fn=scale, **MUON)


def network_of(width: int, base_width: int | None, **settings: int) -> nn.Module:
    torch.manual_seed(0)
    return small(width=width, base_width=base_width, **{"heads": 1} | settings)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> Tensor:
    """Fits noise to images in a few steps; returns the outputs after them, (B, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 16, 1, 8, 8, generator=generator)
    noise = torch.rand(16, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x, noise, Condition()) - target).square().mean().backward()
        optimizer.step()
    return network(x, noise, Condition()).detach()


def trained(width: int, base_width: int | None, make=adam) -> Tensor:
    network = network_of(width, base_width)
    hidden = inner_matrices(network, ends_of(network))
    return train(network, OptimizerFactory(make)(network, list(network.parameters()), hidden))


def growth(base_width: int | None, make=adam) -> float:
    """How many times larger the outputs of the widest network are than those of the narrowest."""
    sizes = [trained(width, base_width, make).abs().mean().item() for width in WIDTHS]
    return sizes[-1] / sizes[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "make", [adam, partial(muon, scale="original"), partial(muon, scale="match_rms_adamw")]
)
def test_outputs_after_a_few_steps_depend_on_the_width_without_mup_alone(make):
    assert growth(None, make) > 3
    assert growth(WIDTHS[0], make) == pytest.approx(1, abs=0.1)


def test_the_embedding_of_jumps_grows_no_faster_in_wide_networks():
    sizes = []
    for width in WIDTHS:
        torch.manual_seed(0)
        network = partial(small, width=width, heads=1, base_width=WIDTHS[0])
        labels = Classes.numbered(2)
        denoiser = Denoiser(network, ClassLabel, Flow(), (1, 8, 8), labels, jumps=True)
        target = denoiser.target
        optimizer = OptimizerFactory(adam)(target, list(target.parameters()), [])
        level = Rectified()(torch.linspace(0.1, 0.9, 16))
        for _ in range(STEPS):
            optimizer.zero_grad()
            (target(level, None, 16) - 1).square().mean().backward()
            optimizer.step()
        sizes.append(target(level, None, 16).square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


def test_a_network_of_the_base_width_trains_as_without_it():
    torch.testing.assert_close(trained(64, 64), trained(64, None), rtol=0, atol=0)


def test_initial_sums_are_those_of_the_base_width():
    x = torch.randn(64, 1, 8, 8)
    for layers in (
        lambda net: net.embed(x.flatten(1)[:, :16]),
        lambda net: net.noise(x[:, 0, 0, 0]),
    ):
        sizes = [layers(network_of(width, 64)).std().item() for width in WIDTHS]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_products_of_attention_are_scaled_by_the_heads_width():
    for heads, scale in ((1, 8 / 512), (8, 1 / 8)):
        assert network_of(512, 64, heads=heads).blocks[0].mixer.scale == pytest.approx(scale)
    assert network_of(512, None).blocks[0].mixer.scale is None


def test_a_condition_with_matrices_of_its_own_is_refused():
    own = NumericLabel(Numbers(2), 64)
    with refused("backbone.base_width=64", "conditioning=class_label"):
        rules.check(backbone=network_of(64, 64), conditioning=own)
    rules.check(backbone=network_of(64, None), conditioning=own)
    rules.check(backbone=network_of(64, 64), conditioning=ClassLabel(Classes.numbered(2), 64))


def test_an_optimizer_whose_steps_grow_with_the_gradient_is_refused():
    sgd = partial(torch.optim.SGD, lr=1e-2)
    with refused("backbone.base_width", "optimizer=adamw"):
        trained(64, 32, sgd)
    trained(64, None, sgd)


@pytest.mark.long
def test_training_is_that_of_microsofts_package():
    mup = pytest.importorskip("mup")
    widths = (256, 256, 64, 128)
    wide, theirs, base, other = (network_of(width, 64, depth=2) for width in widths)
    for network in (theirs, base, other):
        network.out = mup.MuReadout(network.condition_width, 16)  # divides its outputs by W / W0
    mup.set_base_shapes(theirs, base, delta=other, rescale_params=False)
    for parameter in (theirs.out.weight, theirs.out.bias):
        nn.init.zeros_(parameter)
    decay = {True: [], False: []}
    for layer in theirs.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            decay[isinstance(layer, nn.Linear) and name == "weight"].append(parameter)
    groups = [{"params": p, "weight_decay": 0.1 * decayed} for decayed, p in decay.items()]
    own = OptimizerFactory(adam)(wide, list(wide.parameters()), [])
    expected = train(theirs, mup.MuAdamW(groups, lr=ADAM["lr"]), steps=8)
    torch.testing.assert_close(train(wide, own, steps=8), expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().mean() > 0.1
