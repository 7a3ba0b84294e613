"""The fast scans against the recurrences that they stand for, and against mambapy."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.backbone import state_space
from diffusion_lab.backbone.state_space import dual_macs, selective_scan, state_space_dual

LENGTHS = [1, 2, 3, 7, 49, 51, 64, 66, 130]


def sequential(x, dt, a, b, c):
    """Computes the scan token by token, as in its definition."""
    state = x.new_zeros(*x.shape[::2], a.shape[1])  # (B, E, S)
    outputs = []
    for t in range(x.shape[1]):
        added = (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        state = (dt[:, t, :, None] * a).exp() * state + added
        outputs.append((state * c[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def arguments(length: int, batch: int = 2, channels: int = 6, states: int = 3):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [
        draw(batch, length, channels),
        draw(batch, length, channels).abs() / 4,
        -3 * draw(channels, states).abs(),
        draw(batch, length, states),
        draw(batch, length, states),
    ]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_and_its_gradients_are_those_of_the_sequential_recurrence(length):
    leaves = arguments(length)
    ours, theirs = selective_scan(*leaves), sequential(*leaves)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for gradient, expected in zip(
        torch.autograd.grad(ours, leaves, cotangent),
        torch.autograd.grad(theirs, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


def test_blocks_of_channels_change_nothing(monkeypatch):
    leaves = arguments(20)
    whole = torch.autograd.grad(selective_scan(*leaves).square().sum(), leaves)
    monkeypatch.setitem(
        state_space.BLOCK, "cpu", 2 * 20 * 3 * 4
    )  # four of the six channels at a time
    assert len(state_space._blocks(leaves[0].transpose(0, 1), leaves[2])) == 2
    parts = torch.autograd.grad(selective_scan(*leaves).square().sum(), leaves)
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_operator_keeps_what_pytorch_asks_of_one():
    leaves = [leaf.transpose(0, 1) if leaf.ndim == 3 else leaf for leaf in arguments(5)]
    torch.library.opcheck(torch.ops.diffusion_lab.selective_scan.default, tuple(leaves))


@pytest.mark.parametrize("length", [49, 256])
def test_the_scan_and_its_gradients_agree_with_mambapy(length):
    pscan = pytest.importorskip("mambapy.pscan").pscan
    leaves = [leaf.detach().float().requires_grad_() for leaf in arguments(length, states=4)]
    x, dt, a, b, c = leaves
    states = pscan((dt[..., None] * a).exp(), (dt * x)[..., None] * b[:, :, None])
    theirs = (states @ c[..., None])[..., 0]
    ours = selective_scan(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(
        torch.autograd.grad(ours.sum(), leaves),
        torch.autograd.grad(theirs.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [*LENGTHS, 200])
def test_the_dual_form_is_the_scan_with_one_decay_a_head(length):
    x, dt, a, b, c = arguments(length)
    heads, dt, a = x.unflatten(-1, (2, 3)), dt[..., :2], a[:2, 0]
    each = [dt.repeat_interleave(3, 2), a.repeat_interleave(3)[:, None].expand(-1, 3)]
    ours, theirs = state_space_dual(heads, dt, a, b, c), sequential(x, *each, b, c)
    torch.testing.assert_close(ours.flatten(2), theirs)
    leaves = [x, dt, a, b, c]
    for gradient, expected in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


def test_the_dual_form_bears_decays_that_leave_nothing():
    x, dt, a, b, c = (leaf.float() for leaf in arguments(200))
    y = state_space_dual(x.unflatten(-1, (2, 3)), 100 * dt[..., :2] + 100, a[:2, 0] - 1, b, c)
    assert y.isfinite().all()


@pytest.mark.parametrize("length", [49, 66, 200])
def test_counted_operations_are_those_that_pytorch_sees(length):
    x, dt, a, b, c = (leaf.detach() for leaf in arguments(length))
    with FlopCounterMode(display=False) as counter:
        state_space_dual(x.unflatten(-1, (2, 3)), dt[..., :2], a[:2, 0], b, c)
    assert counter.get_total_flops() == 2 * 2 * dual_macs(length, channels=6, state=3)
    with FlopCounterMode(display=False) as counter:
        selective_scan(x, dt, a, b, c)
    assert counter.get_total_flops() == 9 * x.numel() * 3


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_states():
    x, dt, a, b, c = arguments(64, channels=64, states=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        selective_scan(x, dt, a, b, c)
    assert sum(kept) == sum(leaf.numel() for leaf in (x, dt, a, b, c))


@pytest.mark.parametrize("length", [49, 200])
def test_autocast_does_not_reach_the_states(length):
    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, length, n, generator=generator) for n in (32, 16, 16))
    dt = torch.rand(2, length, 32, generator=generator) * 0.1
    rates = -torch.arange(1.0, 17).expand(32, 16)
    exact = selective_scan(x, dt, rates, b, c)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(x, dt, rates, b, c), exact)


def test_autocast_does_not_reach_the_states_between_chunks():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 300, 2, 8)
    x[:, 0] = torch.randn(1, 2, 8, generator=generator)  # later chunks see the first state alone
    dt, rates = torch.full((1, 300, 2), 0.01), torch.tensor([-0.5, -1.0])
    b, c = (torch.randn(1, 300, 16, generator=generator) for _ in range(2))
    exact = state_space_dual(x, dt, rates, b, c)
    with torch.autocast("cpu", torch.bfloat16):
        late = state_space_dual(x, dt, rates, b, c)[:, 64:]
    torch.testing.assert_close(late, exact[:, 64:], rtol=1e-5, atol=1e-7)
