"""Mamba: its paths, its mixer, its state spaces and its sizes."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers.compositions import composed
from hydra.utils import instantiate
from torch import nn

from diffusion_lab.backbone import state_space
from diffusion_lab.backbone.mamba import MambaMixer, zigzag_paths
from diffusion_lab.backbone.patches import PatchNetwork
from diffusion_lab.backbone.state_space import S6, SSD

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
