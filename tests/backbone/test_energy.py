"""An energy: its output is a gradient, in and out of training."""

from functools import partial

import pytest
import torch
from helpers.small_networks import randomised, small_dit

from diffusion_lab.backbone import MLP, Condition, Energy
from diffusion_lab.common.forward_mode import derivative, is_taken

NETWORKS = pytest.mark.parametrize("network", [partial(MLP, width=16, depth=2), small_dit()])


def energy(network):
    """An energy of random weights, and images, noise levels and a condition for it."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 900.0])
    return randomised(Energy(1, 1, (4, 4), network), 0.15), x, noise, Condition()


@NETWORKS
def test_the_output_is_the_gradient_of_the_potential(network):
    model, x, noise, condition = energy(network)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model.potential(x, noise, condition).sum(), x)
    torch.testing.assert_close(model(x, noise, condition), expected)
    network = model.network(x, noise, condition)
    torch.testing.assert_close(
        model.potential(x, noise, condition), (x * network).flatten(1).sum(1)
    )


@pytest.mark.long
@NETWORKS
def test_its_jacobian_is_symmetric_and_the_networks_is_not(network):
    model, x, noise, condition = energy(network)

    def jacobian(function):
        point = x[:1].flatten()
        rows = [derivative(function, (point,), (unit,))[1] for unit in torch.eye(16)]
        return torch.stack(rows)

    def answer(network, point):
        return network(point.view(1, 1, 4, 4), noise[:1], condition).flatten()

    own = jacobian(partial(answer, model))
    torch.testing.assert_close(own, own.mT, rtol=1e-4, atol=1e-4)
    other = jacobian(partial(answer, model.network))
    assert (other - other.mT).abs().max() > 1e-3
    assert not is_taken()


@NETWORKS
def test_it_answers_alike_with_and_without_gradients(network):
    model, x, noise, condition = energy(network)
    expected = model(x, noise, condition)
    with torch.no_grad():
        silent = model(x, noise, condition)
    assert not silent.requires_grad
    with torch.inference_mode():
        faster = model(x * 1, noise * 1, condition)
    torch.testing.assert_close(silent, expected)
    torch.testing.assert_close(faster, expected)


@NETWORKS
def test_its_parameters_have_gradients(network):
    model, x, noise, condition = energy(network)
    model(x, noise, condition).square().sum().backward()
    parameter = next(p for p in model.parameters() if p.ndim == 2 and p.grad.abs().max() > 1e-3)
    place = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
    values = []
    for step in (3e-3, -6e-3):
        with torch.no_grad():
            parameter[place] += step
            values.append(model(x, noise, condition).square().sum())
    slope = (values[0] - values[1]) / 6e-3
    torch.testing.assert_close(parameter.grad[place], slope, rtol=2e-2, atol=1e-3)


def test_an_energy_needs_a_network_with_its_inputs_shape():
    with pytest.raises(ValueError, match="self_conditioning"):
        Energy(2, 1, (4, 4), partial(MLP, width=16, depth=2))
