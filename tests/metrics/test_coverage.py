"""Precision, recall, density and coverage against hand, brute force and torch-fidelity."""

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from diffusion_lab.metrics import neighbours
from diffusion_lab.metrics.neighbours import covered_shares, nearest, radii


def draw(count, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator) * scale + shift


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "PAIRS", 20_000)


REAL, GENERATED = draw(300, 0), draw(250, 1, scale=0.8, shift=0.2)


def test_nearest_are_the_nearest_in_order():
    values, index = nearest(GENERATED, REAL, 4)
    expected = torch.cdist(GENERATED.double(), REAL.double()).sort(1)
    torch.testing.assert_close(values, expected.values[:, :4])
    assert torch.equal(index, expected.indices[:, :4])
    assert values.dtype == torch.float64


def test_a_radius_reaches_to_the_neighbour_beside_itself():
    line = torch.tensor([0.0, 1.0, 3.0, 7.0])[:, None]
    assert radii(line, 1).tolist() == [1, 1, 2, 4]
    assert radii(line, 3).tolist() == [7, 6, 4, 7]


def test_precision_and_recall_are_torch_fidelitys():
    ours = covered_shares(GENERATED, REAL)[:2]
    theirs = calculate_precision_recall_full(GENERATED, REAL, neighborhood=3)
    assert 0.3 < ours[1] < ours[0] < 1
    assert ours == pytest.approx(tuple(float(value) for value in theirs))


def test_density_and_coverage_are_counted():
    between = torch.cdist(GENERATED.double(), REAL.double())
    reach = torch.cdist(REAL.double(), REAL.double()).sort(1).values[:, 5]
    inside = between < reach
    _, _, density, covered = covered_shares(GENERATED, REAL)
    assert density == pytest.approx(inside.sum().item() / (5 * 250))
    assert covered == pytest.approx(inside.any(0).double().mean().item())


def test_a_collapsed_generator_has_numbers():
    collapsed = REAL[:1].repeat(100, 1)
    precision, recall, _, covered = covered_shares(collapsed, REAL)
    assert precision == 1
    assert recall < 0.02
    assert covered < 0.1
