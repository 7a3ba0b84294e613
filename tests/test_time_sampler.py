"""Time samplers: distributions, strata, tables, and what a seed decides."""

import math

import pytest
import torch

from diffusion_lab.objective import LogitNormal, LogNormal, TimeSampler, Uniform
from diffusion_lab.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

N = 20_000


def normal_cdf(z):
    return torch.special.ndtr(z)


# a sampler, and what turns its levels into uniform numbers
CASES = [
    (Uniform, lambda level: level.t),
    (lambda **k: LogitNormal(0.5, 2.0, **k), lambda level: normal_cdf((level.t.logit() - 0.5) / 2)),
    (
        lambda **k: LogNormal(-1.2, 1.2, **k),
        lambda level: normal_cdf(((level.sigma / level.alpha).log() + 1.2) / 1.2),
    ),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), VarianceExploding()])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("build", "to_uniform"), CASES)
def test_distribution(build, to_uniform, stratified, schedule):
    level, importance = build(stratified=stratified)(N, schedule, seeded())
    assert level.t.shape == importance.shape == (N,)
    assert level.t.dtype == torch.float64
    assert importance.dtype == torch.float32
    assert (importance == 1).all()
    assert level.sigma.min() > 0
    assert level.t.max() <= 1
    u = to_uniform(level).sort().values
    # Kolmogorov-Smirnov at about the 0.1 % level; strata are within one cell
    distance = (u - torch.arange(1, N + 1) / N).abs().max()
    assert distance < (1e-4 if stratified else 1.95 / math.sqrt(N))


def test_moments():
    t = Uniform()(N, Rectified(), seeded())[0].t
    assert t.mean() == pytest.approx(0.5, abs=0.01)
    assert t.std() == pytest.approx(12**-0.5, abs=0.01)
    level = LogNormal()(N, VarianceExploding(), seeded())[0]
    assert level.sigma.log().mean() == pytest.approx(-1.2, abs=0.03)  # EDM's P_mean
    assert level.sigma.log().std() == pytest.approx(1.2, abs=0.03)  # and P_std
    logit = LogitNormal()(N, Rectified(), seeded())[0].t.logit()
    assert logit.mean() == pytest.approx(0, abs=0.03)
    assert logit.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize(("build", "to_uniform"), CASES)
def test_every_stratum_is_hit_once_and_in_random_order(build, to_uniform, n):
    u = to_uniform(build(stratified=True)(n, Rectified(), seeded())[0])
    strata = (u * n).ceil().long() - 1
    assert sorted(strata.tolist()) == list(range(n))
    if n == 64:
        assert strata.tolist() != sorted(strata.tolist())
        other = to_uniform(build(stratified=True)(n, Rectified(), seeded(1))[0])
        assert not torch.equal((other * n).ceil().long() - 1, strata)


@pytest.mark.parametrize(("build", "to_uniform"), CASES)
def test_a_discrete_schedule_gets_points_of_its_table(build, to_uniform):
    schedule = DDPMLinear(10, 0.01, 0.3)
    index = build(stratified=False)(N, schedule, seeded())[0].t * 10 - 1
    assert torch.allclose(index, index.round(), atol=1e-12)
    assert index.min() >= -1e-12
    assert index.max() <= 9 + 1e-12


def test_a_table_has_no_clean_point():
    class Cleanest(TimeSampler):
        def quantile(self, u, schedule):
            return torch.zeros_like(u)

    level, _ = Cleanest()(4, DDPMLinear(10, 0.01, 0.3), seeded())
    assert level.t.tolist() == [0.1] * 4


def test_every_point_of_a_table_is_equally_likely():
    level, _ = Uniform(stratified=True)(1000, DDPMLinear(), seeded())
    assert (level.t * 1000 - 1).round().long().sort().values.tolist() == list(range(1000))
    level, _ = Uniform()(N, DDPMLinear(10, 0.01, 0.3), seeded())
    counts = torch.bincount((level.t * 10 - 1).round().long(), minlength=10)
    assert (counts / N - 0.1).abs().max() < 0.01


def test_draws_beyond_the_schedule_are_put_on_its_ends():
    level, _ = LogNormal(mean=0.0, std=10.0)(N, VarianceExploding(), seeded())
    assert level.sigma.min().item() == pytest.approx(0.002)
    assert level.sigma.max().item() == pytest.approx(80)
    assert (level.t == 1).double().mean() == pytest.approx(0.33, abs=0.02)


def test_the_generator_decides():
    sampler, schedule = LogitNormal(stratified=True), Rectified()
    first, again = (sampler(9, schedule, seeded(3))[0].t for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(3)
    assert torch.equal(sampler(9, schedule)[0].t, first)  # the global generator, without one
    assert not torch.equal(sampler(9, schedule)[0].t, first)


@pytest.mark.parametrize("build", [LogitNormal, LogNormal])
def test_std_must_be_positive(build):
    with pytest.raises(ValueError, match="std=0"):
        build(std=0)
