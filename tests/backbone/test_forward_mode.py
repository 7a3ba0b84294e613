"""Forward-mode derivatives of every kind of backbone are those of finite differences."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers.compositions import composed
from helpers.small_networks import randomised
from hydra.utils import instantiate
from test_backbone import CONFIGURED
from torch import nn

from diffusion_lab.backbone.conditioning import ClassLabel
from diffusion_lab.common.forward_mode import derivative, is_taken, plain_operations
from diffusion_lab.common.labels import Classes

UNET = CONFIGURED["unet"]
NETWORKS = {
    "unet_fir": [*UNET, "backbone/resample=fir"],
    "unet_ldm": [*UNET, "backbone/stage=ldm"],
    "unet_adm": [*UNET, "backbone/stage=adm"],
    "mlp": ["backbone=mlp", "backbone.width=32", "backbone.depth=2"],
}
KINDS = ["unet", "dit_adaln_zero", "dit_cross_attention", "dit_in_context_rotary_window"]
KINDS += ["mamba_adaln_zero", "mamba2", "dit_modern", "mamba2_modern", "edm2"]
NETWORKS |= {name: CONFIGURED[name] for name in KINDS}
each = pytest.mark.parametrize("name", NETWORKS)


@cache
def asked(name: str):
    """A random network as a function of image and noise label, a point, and a direction from it."""
    cfg = composed("train", *NETWORKS[name])
    generator = torch.Generator().manual_seed(1)
    network = randomised(instantiate(cfg.backbone)(1, 1, (8, 8)))
    conditioning = randomised(ClassLabel(Classes.numbered(3), network.condition_width))
    with torch.no_grad():
        condition = conditioning(torch.tensor([0, 1, 3]), 3)
    shapes = ((3, 1, 8, 8), (3,), (3, network.condition_width))
    at, along = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    at[1] = at[1].abs() * 300

    def function(x, noise, vector):
        return network(x, noise, condition.joined(vector))

    return function, at, along


def differences(function, at, along, h: float = 1e-2) -> torch.Tensor:
    """The derivative by central differences; a noise label's sinusoid turns once in 6."""
    ends = []
    for sign in (1, -1):
        moved = [a + sign * h * b for a, b in zip(at, along, strict=True)]
        ends.append(function(*moved))
    return (ends[0] - ends[1]) / (2 * h)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error, as a share of the norm of what is expected."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@each
def test_the_derivative_is_that_of_finite_differences(name):
    function, at, along = asked(name)
    value, found = derivative(function, at, along)
    expected = differences(function, at, along)
    assert expected.norm() > 0.1 * value.norm(), "the derivative matters"
    torch.testing.assert_close(value, function(*at), rtol=1e-4, atol=1e-5)
    assert relative(found, expected) < 5e-3
    assert not is_taken()


@each
def test_the_derivative_under_bf16_is_that_of_float32(name):
    function, at, along = asked(name)
    _, expected = derivative(function, at, along)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = derivative(function, at, along)
    assert relative(found, expected) < 0.1


@pytest.mark.parametrize("name", ["unet", "dit_adaln_zero", "mamba2"])
def test_the_derivative_keeps_the_graph_of_the_value(name):
    function, at, along = asked(name)
    value, _ = derivative(function, at, along)
    plain = function(*at)
    weights = [p for p in parameters_of(plain) if p.requires_grad]
    found, expected = (torch.autograd.grad(y.square().sum(), weights) for y in (value, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def parameters_of(value: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of a value's graph."""
    leaves, seen, nodes = [], set(), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def test_an_operation_without_the_derivative_is_named():
    def cannot(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="scaled_dot_product"):
        derivative(cannot, [x], [x])
    assert not is_taken()


def test_other_errors_pass():
    def wrong(x):
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        derivative(wrong, [torch.ones(1)], [torch.ones(1)])


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "affine": lambda x: F.layer_norm(
        x, (2, 6), torch.arange(12.0).double().view(2, 6), torch.ones(2, 6).double()
    ),
    "module": nn.LayerNorm(6, elementwise_affine=False, eps=0.1),
    "group_norm": lambda x: F.group_norm(x, 2),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_derivative_of_a_norm_has_the_right_gradient(name):
    function = NORMS[name]
    torch.manual_seed(0)
    x, along, weights, step = torch.randn(4, 3, 2, 6, dtype=torch.float64)

    def slope(x):
        return (derivative(lambda y: function(y).double(), (x,), (along,))[1] * weights).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(slope(x), x)
    with torch.no_grad():
        expected = (slope(x + 1e-6 * step) - slope(x - 1e-6 * step)) / 2e-6
    assert (gradient * step).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    with plain_operations():
        plain = function(x)
    torch.testing.assert_close(plain, function(x))
