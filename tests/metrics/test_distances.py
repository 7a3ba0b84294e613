import math
from types import SimpleNamespace

import pytest
import torch
from helpers.refusals import refused
from torch_fidelity.metric_kid import kernel_rbf
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from diffusion_lab.metrics import distances as module
from diffusion_lab.metrics.distances import (
    FeatureSet,
    covariance_root,
    frechet,
    frechet_of_halves,
    kid,
    mind,
    mmd,
)

torch_fidelity = pytest.importorskip("torch_fidelity.metric_fid")

DIM = 24


def draw(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(7))
    return (torch.randn(count, DIM, generator=generator) @ mixing + shift).float()


def gaussian(mean, cov):
    return SimpleNamespace(mean=mean, root=covariance_root(cov))


def test_frechet_distance_of_gaussians_in_one_frame_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator).double())[0]
    variances = torch.rand(2, DIM, generator=generator).double() + 0.1
    means = torch.randn(2, DIM, generator=generator).double()
    expected = (means.diff(dim=0) ** 2 + variances.sqrt().diff(dim=0) ** 2).sum().item()
    for frame in (torch.eye(DIM).double(), rotation):
        covariances = [frame @ torch.diag(each) @ frame.T for each in variances]
        value = frechet(*map(gaussian, means, covariances))
        assert value == pytest.approx(expected, rel=1e-12)


def test_moments_are_those_of_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)
    features = draw(37, 0, shift=100.0)
    found = FeatureSet(features)
    assert found.mean.dtype == found.root.dtype == torch.float64
    torch.testing.assert_close(found.mean, features.double().mean(0))
    torch.testing.assert_close(found.root.T @ found.root, features.double().T.cov())


@pytest.mark.parametrize("count", [2, 10, DIM, DIM + 1, 500])
def test_a_set_is_at_distance_zero_from_itself(count):
    features = draw(count, 0)
    a = FeatureSet(features)
    assert a.root.shape == (min(count, DIM), DIM)
    torch.testing.assert_close(a.root.T @ a.root, features.double().T.cov())
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(400, 300), (10, 300), (300, 10), (10, 12), (DIM, DIM + 1)])
def test_frechet_agrees_with_torch_fidelity_and_torchmetrics(n, m):
    sides = draw(n, 1), draw(m, 2, shift=0.1)
    ours = frechet(*map(FeatureSet, sides))
    both = [torch_fidelity.fid_features_to_statistics(each.double()) for each in sides]
    theirs = torch_fidelity.fid_statistics_to_metric(*both, verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    moments = [(each.double().mean(0), each.double().T.cov()) for each in sides]
    assert ours == pytest.approx(_compute_fid(*moments[0], *moments[1]).item(), rel=1e-6)
    gaussians = (gaussian(*each) for each in moments)
    assert ours == pytest.approx(frechet(*gaussians), rel=1e-6)


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_kid_agrees_with_torchmetrics_on_one_subset_of_all(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    a, b = draw(90, 1), draw(90, 2, shift=0.1)  # torchmetrics needs equal sizes
    expected = poly_mmd(a.double(), b.double()).item()
    assert kid(FeatureSet(a), FeatureSet(b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_mmd_is_that_of_cmmd(shift):
    """CMMD's estimator with all pairs of directions, diagonals included; sizes may be unequal."""
    a, b = (draw(n, seed, by) for n, seed, by in ((90, 1, 0.0), (70, 2, shift)))

    def kernel(x, y):
        x, y = (each.double() / each.double().norm(dim=1, keepdim=True) for each in (x, y))
        return kernel_rbf(x.numpy(), y.numpy(), kid_kernel_rbf_sigma=10).mean()

    expected = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert mmd(FeatureSet(a), FeatureSet(b)) == pytest.approx(expected, rel=1e-4)
    assert mmd(FeatureSet(5 * a), FeatureSet(b)) == pytest.approx(expected, rel=1e-4)
    assert mmd(FeatureSet(a), FeatureSet(a)) == pytest.approx(0, abs=1e-12)


def test_mind_is_that_of_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 8, generator=generator) for n in (300, 200))
    # by mind_features_to_metric of its commit 5e211a9, which no release has
    assert mind(FeatureSet(a), FeatureSet(1.5 * b + 0.3)) == pytest.approx(7.5773613, rel=1e-6)


@pytest.mark.long
def test_mind_is_the_sliced_distance_of_gaussians(monkeypatch):
    x = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.0, 0.3]), 1.5
    # along u the means differ by u . shift, whose square is |shift|^2 / D in the mean
    expected = 3 * shift.square().sum().item() + 3 * 6 * (scale - 1) ** 2
    a = FeatureSet(x[:8000])
    found = mind(a, FeatureSet(scale * x[8000:] + shift))  # sizes are unequal
    assert found == pytest.approx(expected, rel=0.03)
    monkeypatch.setattr(module, "TOGETHER", 7 * 8000)
    assert mind(a, FeatureSet(scale * x[8000:] + shift)) == pytest.approx(found, rel=1e-12)
    assert mind(a, a) == 0
    assert mind(a, FeatureSet(x[8000:16_000])) < 0.02


def test_kid_of_unequal_sizes_is_the_definition():
    a, b = draw(31, 1).double(), draw(50, 2).double()

    def kernel(x, y):
        return (x @ y.T / DIM + 1) ** 3

    within = [
        (kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    expected = sum(within) - 2 * kernel(a, b).mean()
    value = kid(FeatureSet(a.float()), FeatureSet(b.float()))
    assert value == pytest.approx(expected.item(), rel=1e-9)


def test_one_image_is_refused():
    with refused("2 images", "not 1"):
        FeatureSet(draw(1, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    features = draw(10, 0)
    features[3, 5] = bad
    with refused("1 of 10 images", "number 3"):
        FeatureSet(features)


def normal(count, seed, dim=32):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "valid"), [(24, False), (32, False), (512, True)])
def test_the_limit_needs_more_images_than_features_and_the_spread_is_conservative(count, valid):
    zero, one = torch.zeros(32, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    reference = gaussian(zero, one)  # N(0, 1) itself
    sets = [FeatureSet(normal(count, seed)) for seed in range(1, 31)]
    values = torch.tensor([frechet(each, reference) for each in sets], dtype=torch.float64)
    halves = torch.stack([frechet_of_halves(each, reference, 5) for each in sets])
    # the true FID-infinity is 0, as both sides are N(0, 1)
    extrapolated = (2 * values - halves.mean(1)).mean().item()
    assert (abs(extrapolated) < 0.05 * values.mean().item()) == valid
    assert values.std().item() < halves.std(1, correction=0).mean().item() < 2.2 * values.std()


@pytest.mark.parametrize(
    "features",
    [torch.zeros(100, DIM), torch.full((100, DIM), 3.0), draw(1, 0).repeat(50, 1), draw(2, 0)],
    ids=["zero", "constant", "collapsed", "two"],
)
def test_degenerate_sets_have_real_numbers(features):
    reference = FeatureSet(draw(500, 5))
    degenerate = FeatureSet(features)
    for a, b in ((degenerate, reference), (degenerate, degenerate)):
        assert math.isfinite(frechet(a, b))
        assert math.isfinite(kid(a, b))
    centre = features.double().mean(0) - reference.mean
    if len(features) > 2:  # a single point: distance of means plus the reference's variance
        expected = centre.square().sum() + reference.root.square().sum()
        assert frechet(degenerate, reference) == pytest.approx(expected.item(), rel=1e-6)
