"""Mamba: its paths, its mixer, its state spaces and its sizes."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers.compositions import composed
from hydra.utils import instantiate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.backbone import state_space
from diffusion_lab.backbone.mamba import MambaMixer, zigzag_paths
from diffusion_lab.backbone.patches import PatchNetwork
from diffusion_lab.backbone.state_space import S6, SSD, dual_macs, selective_scan, state_space_dual

SCANS = {"s6": partial(S6, state=4), "ssd": partial(SSD, state=4, head_channels=8)}
each_scan = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)


def network(*overrides: str) -> PatchNetwork:
    backbone = composed("train", *overrides).backbone
    return instantiate(backbone)(in_channels=1, out_channels=1, image_size=(8, 8))


def initialised(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if initialise := getattr(part, "initialise", None):
            initialise()
    return module


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (2, 7)])
def test_the_eight_paths_visit_every_patch_once_from_neighbour_to_neighbour(rows, columns):
    paths = zigzag_paths(rows, columns)
    assert len({tuple(path.tolist()) for path in paths}) == 8
    for path in paths:
        assert path.sort().values.tolist() == list(range(rows * columns))
        place = torch.stack([path // columns, path % columns], dim=1)
        assert place.diff(dim=0).abs().sum(1).tolist() == [1] * (rows * columns - 1)


def test_a_path_and_the_next_go_along_both_axes_and_start_in_opposite_corners():
    paths = zigzag_paths(3, 4)
    assert paths[0].tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert paths[1].tolist() == [11, 7, 3, 2, 6, 10, 9, 5, 1, 0, 4, 8]
    corners = [0, 11, 8, 3, 11, 0, 3, 8]
    assert [path[0].item() for path in paths] == corners


@each_scan
def test_a_token_sees_those_before_it_on_its_path(scan):
    torch.manual_seed(0)
    path = torch.tensor([2, 0, 3, 1])
    mixer = initialised(MambaMixer(16, 2, 4, scan, path=path))
    x = torch.randn(1, 6, 16)  # two tokens before the four of the path
    changed = x.clone()
    changed[0, 2 + 0] += 1  # the second token on the path
    moved = (mixer(x) != mixer(changed)).any(-1)[0].tolist()
    assert moved == [False, False, True, True, False, True]


@each_scan
def test_the_way_back_is_the_way_forth_through_the_flipped_sequence(scan):
    torch.manual_seed(0)
    both = initialised(MambaMixer(16, 2, 4, scan, bidirectional=True))
    one = MambaMixer(16, 2, 4, scan)
    with torch.no_grad():  # the contribution of the backward direction alone
        for parameter in both.forward_scan.parameters():
            parameter.zero_()
    one.load_state_dict(
        {
            name.replace("backward_scan.", "forward_scan."): tensor
            for name, tensor in both.state_dict().items()
            if not name.startswith("forward_scan.")
        }
    )
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(both(x), one(x.flip(1)).flip(1))


def test_steps_and_decays_start_as_published():
    torch.manual_seed(0)
    module = initialised(S6(256, 16))
    steps = nn.functional.softplus(module.dt_proj.bias)
    assert 1e-3 <= steps.min() < 2e-3
    assert 5e-2 < steps.max() <= 0.1
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.2)  # log-uniform
    torch.testing.assert_close(module.log_decay.exp()[7], torch.arange(1.0, 17.0))
    assert torch.equal(module.skip, torch.ones(256))
    assert module.rank == 8
    decay = initialised(SSD(2048, 16, 8)).log_decay.exp()
    assert 1 <= decay.min() < 1.5
    assert 15.5 < decay.max() <= 16


def test_a_network_keeps_the_initialisation_of_its_parts():
    torch.manual_seed(0)
    mixer = network("backbone=mamba", "backbone.width=64", "backbone.depth=1").blocks[0].mixer
    scan = mixer.forward_scan[1]
    assert nn.functional.softplus(scan.dt_proj.bias).max() <= 0.1
    torch.testing.assert_close(scan.log_decay.exp()[3], torch.arange(1.0, 17.0))


def test_the_mixer_is_mambapys_block():
    mambapy = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    theirs = mambapy.MambaBlock(mambapy.MambaConfig(d_model=64, n_layers=1))
    ours = MambaMixer(64, 2, 4, partial(S6, state=16))
    convolution, scan = ours.forward_scan
    names = {
        "in_proj": ours.in_proj,
        "x_proj": scan.project,
        "dt_proj": scan.dt_proj,
        "out_proj": ours.out_proj,
    }
    with torch.no_grad():
        for name, module in names.items():
            module.load_state_dict(getattr(theirs, name).state_dict())
        convolution.weight.copy_(theirs.conv1d.weight[:, 0].T)
        convolution.bias.copy_(theirs.conv1d.bias)
        scan.log_decay.copy_(theirs.A_log + torch.randn(128, 16))
        theirs.A_log.copy_(scan.log_decay)
        scan.skip.normal_()
        theirs.D.copy_(scan.skip)
    x = torch.randn(2, 49, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_layers_follow_the_eight_paths_in_turn():
    blocks = network("backbone=mamba", "backbone.patch=2", "backbone.depth=9").blocks
    paths = zigzag_paths(4, 4)
    for i, block in enumerate(blocks):
        assert torch.equal(block.mixer.path, paths[i % 8])
    assert not any("path" in name for name in blocks.state_dict())


@pytest.mark.parametrize(
    ("module", "function"), [(S6(32, 4), "selective_scan"), (SSD(32, 4, 8), "state_space_dual")]
)
def test_states_are_float32_under_autocast_and_float64_where_asked(monkeypatch, module, function):
    original, seen = getattr(state_space, function), []

    def watch(*tensors):
        seen.extend(tensor.dtype for tensor in tensors)
        return original(*tensors)

    monkeypatch.setattr(state_space, function, watch)
    x = torch.randn(1, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert initialised(module)(x.bfloat16()).dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    seen.clear()
    assert deepcopy(module).double()(x.double()).dtype == torch.float64
    assert set(seen) == {torch.float64}


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
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, cotangent), expected)


def test_blocks_of_channels_change_nothing(monkeypatch):
    leaves = arguments(20)
    whole = torch.autograd.grad(selective_scan(*leaves).square().sum(), leaves)
    # four of the six channels at a time
    monkeypatch.setitem(state_space.BLOCK, "cpu", 2 * 20 * 3 * 4)
    assert len(state_space._blocks(leaves[0].transpose(0, 1), leaves[2])) == 2
    parts = torch.autograd.grad(selective_scan(*leaves).square().sum(), leaves)
    torch.testing.assert_close(parts, whole)


@pytest.mark.long
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
    gradients, expected = (torch.autograd.grad(y.sum(), leaves) for y in (ours, theirs))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [*LENGTHS, 200])
def test_the_dual_form_is_the_scan_with_one_decay_a_head(length):
    x, dt, a, b, c = arguments(length)
    heads, dt, a = x.unflatten(-1, (2, 3)), dt[..., :2], a[:2, 0]
    each = [dt.repeat_interleave(3, 2), a.repeat_interleave(3)[:, None].expand(-1, 3)]
    ours, theirs = state_space_dual(heads, dt, a, b, c), sequential(x, *each, b, c)
    torch.testing.assert_close(ours.flatten(2), theirs)
    gradients, expected = (
        torch.autograd.grad(y.square().sum(), [x, dt, a, b, c]) for y in (ours, theirs)
    )
    torch.testing.assert_close(gradients, expected)


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
