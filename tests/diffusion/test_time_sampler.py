"""Time samplers: distributions, strata, tables, and reproducibility by a seed."""

import math

import pytest
import torch
from helpers.pairs import each_once

from diffusion_lab.diffusion.objective import (
    BatchShare,
    CosineInterpolated,
    LogitNormal,
    LogNormal,
    SecondMoment,
    TimeSampler,
    UniformTime,
)
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

N = 20_000
MIXED = {"mean": 0.3, "std": 1.5, "uniform": 0.25}


def normal_cdf(z, mean, std):
    return torch.special.ndtr((z - mean) / std)


# a sampler, and the function that turns its levels into uniform numbers
CASES = [
    (UniformTime, lambda level: level.t),
    (lambda **k: LogitNormal(0.5, 2.0, **k), lambda level: normal_cdf(level.t.logit(), 0.5, 2)),
    (
        lambda **k: LogitNormal(**MIXED, **k),
        lambda level: 0.25 * level.t + 0.75 * normal_cdf(level.t.logit(), 0.3, 1.5),
    ),
    (
        lambda **k: LogNormal(-1.2, 1.2, **k),
        lambda level: normal_cdf((level.sigma / level.alpha).log(), -1.2, 1.2),
    ),
]


every_sampler = pytest.mark.parametrize(("build", "to_uniform"), CASES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), VarianceExploding()])
@pytest.mark.parametrize("stratified", [False, True])
@every_sampler
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


@pytest.mark.parametrize(("n", "parts"), [(1, 1), (7, 1), (64, 1), (8, 2), (8, 3)])
@every_sampler
def test_every_stratum_is_hit_once_in_random_order_also_by_calls_that_share_a_batch(
    build, to_uniform, n, parts
):
    sampler = build(stratified=True)

    def strata(seed):
        levels = [
            sampler(n, Rectified(), seeded(seed + part), BatchShare(part, parts))[0]
            for part in range(parts)
        ]
        u = torch.cat([to_uniform(level) for level in levels])
        return ((u * n * parts).ceil().long() - 1).tolist()

    assert sorted(strata(0)) == list(range(n * parts))
    if n == 64:
        assert strata(0) != sorted(strata(0))
        assert strata(1) != strata(0)


@every_sampler
def test_a_discrete_schedule_gets_points_of_its_table(build, to_uniform):
    schedule = DDPMLinear(10, 1e-4, 5e-3)
    index = build(stratified=False)(N, schedule, seeded())[0].t * 10 - 1
    assert torch.allclose(index, index.round(), atol=1e-12)
    assert index.min() >= -1e-12
    assert index.max() <= 9 + 1e-12


def test_a_table_has_no_clean_point():
    class Cleanest(TimeSampler):
        def quantile(self, u, schedule):
            return torch.zeros_like(u)

    level, _ = Cleanest()(4, DDPMLinear(10, 1e-4, 5e-3), seeded())
    assert level.t.tolist() == [0.1] * 4


def test_every_point_of_a_table_is_equally_likely():
    level, _ = UniformTime(stratified=True)(1000, DDPMLinear(), seeded())
    assert (level.t * 1000 - 1).round().long().sort().values.tolist() == list(range(1000))
    level, _ = UniformTime()(N, DDPMLinear(10, 1e-4, 5e-3), seeded())
    counts = torch.bincount((level.t * 10 - 1).round().long(), minlength=10)
    assert (counts / N - 0.1).abs().max() < 0.01


def test_quantiles_without_a_closed_form_are_exact():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = LogitNormal(**MIXED).quantile(u, Rectified())
    share = 0.25 * t + 0.75 * normal_cdf(t.logit(), 0.3, 1.5)
    torch.testing.assert_close(share, u, rtol=0, atol=1e-14)


def test_draws_beyond_the_schedule_are_put_on_its_ends():
    level, _ = LogNormal(mean=0.0, std=10.0)(N, VarianceExploding(), seeded())
    assert level.sigma.min().item() == pytest.approx(0.002)
    assert level.sigma.max().item() == pytest.approx(80)
    assert (level.t == 1).double().mean() == pytest.approx(0.33, abs=0.02)


def logit_normal_density(t, mean, std):
    normal = torch.distributions.Normal(mean, std)
    return normal.log_prob(t.logit()).exp() / (t * (1 - t))


def test_density():
    t = torch.tensor([0.02, 0.05, 0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    assert UniformTime().density(torch.ones(1), Rectified()).item() == pytest.approx(1)
    for sampler, expected in (
        (LogitNormal(), logit_normal_density(t, 0.0, 1.0)),
        (LogitNormal(**MIXED), 0.25 + 0.75 * logit_normal_density(t, 0.3, 1.5)),
        # log(sigma / alpha) = logit(t) on the straight path
        (LogNormal(-1.2, 1.2), logit_normal_density(t, -1.2, 1.2)),
    ):
        found = sampler.density(t, Rectified())
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.002)


def test_the_generator_decides():
    sampler, schedule = LogitNormal(stratified=True), Rectified()
    first, again = (sampler(9, schedule, seeded(3))[0].t for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(3)
    assert torch.equal(sampler(9, schedule)[0].t, first)  # without a generator the global one draws
    assert not torch.equal(sampler(9, schedule)[0].t, first)


def test_one_call_alone_draws_what_it_always_drew():
    for stratified, share in ((True, BatchShare(0, 1)), (False, BatchShare(2, 4))):
        sampler = LogitNormal(stratified=stratified)
        alone, part = (sampler(9, Rectified(), seeded(), *more)[0].t for more in ((), (share,)))
        assert torch.equal(alone, part)


def k_diffusion_sigma(u, image, low, high, sigma_min, sigma_max):
    """Computes rand_cosine_interpolated at sigma_data = 1, where u runs from noise to data."""

    def cosine(lower, upper):
        start, end = math.atan(math.exp(-upper / 2)), math.atan(math.exp(-lower / 2))
        return -2 * (start + u * (end - start)).tan().log()

    # the original swaps these names, which reverses its direction
    lower, upper = -2 * math.log(sigma_min), -2 * math.log(sigma_max)
    shifts = [2 * math.log(noise / image) for noise in (low, high)]
    logsnr = [cosine(lower - shift, upper - shift) + shift for shift in shifts]
    return (-torch.lerp(*logsnr, u) / 2).exp()


@pytest.mark.parametrize(("image", "low", "high"), [(64, 32, 64), (32, 32, 32), (32, 16, 48)])
def test_cosine_interpolated_is_k_diffusions(image, low, high):
    """Compares sigma at 999 quantiles with k-diffusion's rand_cosine_interpolated."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    ends = {"logsnr_min": -2 * math.log(80), "logsnr_max": -2 * math.log(0.01)}
    schedule = VarianceExploding()
    t = CosineInterpolated(low / image, high / image, **ends).quantile(u, schedule)
    expected = k_diffusion_sigma(1 - u, image, low, high, 0.01, 80)
    torch.testing.assert_close(schedule(t).sigma, expected)
    assert (t.diff() > 0).all()


def test_cosine_interpolated_is_the_cosine_schedule_itself_at_equal_resolutions():
    u = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    sampler = CosineInterpolated(logsnr_min=-20, logsnr_max=20)
    torch.testing.assert_close(sampler.quantile(u, Cosine()), u)
    # half the resolution: a quarter of the signal-to-noise ratio, in the middle
    shifted = CosineInterpolated(0.5, 0.5, logsnr_min=-20, logsnr_max=20)
    middle = Rectified()(shifted.quantile(u[:1] * 0 + 0.5, Rectified())).logsnr
    assert middle.item() == pytest.approx(-math.log(4), abs=1e-3)


def mean_losses(t):
    """Returns a loss that is large on clean data, like the variational bound."""
    return 0.01 + 5 * (-20 * t).exp()


def warm(stratified=False, bins=10, history=5):
    sampler = SecondMoment(bins=bins, history=history, uniform=0.01, stratified=stratified)
    t = (torch.arange(bins * history, dtype=torch.float64) + 0.5) / (bins * history)
    sampler.observe(t, mean_losses(t))
    return sampler


def published_probabilities(history, uniform):
    """Returns improved DDPM's probabilities: sqrt(mean(loss^2)), mixed with a uniform share."""
    weights = [math.sqrt(sum(x * x for x in row) / len(row)) for row in history]
    return [(1 - uniform) * w / sum(weights) + uniform / len(weights) for w in weights]


def test_second_moment_is_uniform_until_every_part_has_its_history():
    sampler = SecondMoment(bins=4, history=2)
    assert (sampler.uniform, SecondMoment().history.shape) == (0.001, (100, 10))
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9], dtype=torch.float64)
    sampler.observe(t, torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    assert sampler.probabilities().tolist() == [0.25] * 4
    level, importance = sampler(N, Rectified(), seeded())
    assert torch.equal(level.t, UniformTime()(N, Rectified(), seeded())[0].t)
    assert (importance == 1).all()
    sampler.observe(t[-1:], torch.ones(1))
    expected = published_probabilities([[9, 9], [1, 1], [1, 1], [1, 1]], 0.001)
    assert sampler.probabilities().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_second_moment_is_uniform_while_a_loss_is_not_finite(loss):
    sampler = SecondMoment(bins=2, history=1)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    sampler.observe(t, torch.tensor([loss, 1.0]))
    assert sampler.probabilities().tolist() == [0.5, 0.5]
    sampler.observe(t, torch.tensor([3.0, 1.0]))
    assert sampler.probabilities()[0] > 0.7


def test_second_moment_keeps_the_last_losses_of_each_part_whatever_the_batches():
    generator = seeded()
    t = torch.rand(300, generator=generator, dtype=torch.float64)
    losses = torch.rand(300, generator=generator)
    history = [[] for _ in range(5)]
    for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
        history[math.ceil(time * 5) - 1].append(loss)
    expected = published_probabilities([row[-3:] for row in history], 0.001)
    for size in (1, 7, 300):
        sampler = SecondMoment(bins=5, history=3)
        for some, of_them in zip(t.split(size), losses.split(size), strict=True):
            sampler.observe(some, of_them)
        assert sampler.probabilities().tolist() == pytest.approx(expected)


def test_points_of_a_table_belong_to_the_part_below_them():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    parts = SecondMoment(bins=100).part_of(t)
    assert torch.equal(parts, torch.arange(1000) // 10)


def test_second_moment_draws_each_part_by_its_probability():
    sampler = warm()
    level, importance = sampler(N, Rectified(), seeded())
    share, part = sampler.probabilities(), sampler.part_of(level.t)
    counts = torch.bincount(part, minlength=10) / N
    assert (counts - share).abs().max() < 0.01
    torch.testing.assert_close(importance.double(), 1 / (10 * share[part]), rtol=1e-6, atol=0)
    inside = level.t * 10 - part  # uniform inside its part
    assert inside.mean() == pytest.approx(0.5, abs=0.01)
    u = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    assert (sampler.quantile(u, Rectified()).diff() > 0).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "stratified"),
    each_once(
        {"path": Rectified(), "table": DDPMLinear(25, 1e-4, 0.02)}, {"strata": True, "free": False}
    ),
)
def test_importance_sampling_is_unbiased_and_less_noisy(schedule, stratified):
    """The parts need not fit the points of a table: there are ten parts and 25 points."""
    if schedule.discrete_steps:
        points = torch.arange(1, 26, dtype=torch.float64) / 25
        exact = mean_losses(points).mean()
    else:
        exact = torch.tensor(0.01 + 5 * (1 - math.exp(-20)) / 20)

    def batch_means(sampler):
        generator = seeded()
        draws = [sampler(16, schedule, generator) for _ in range(4000)]
        return torch.stack([(mean_losses(level.t) * weight).mean() for level, weight in draws])

    weighted, plain = batch_means(warm(stratified)), batch_means(UniformTime(stratified))
    assert weighted.mean().item() == pytest.approx(exact.item(), rel=0.02)
    assert weighted.std() < 0.7 * plain.std()


def test_second_moment_lives_in_a_state_dict():
    sampler, copy = warm(), SecondMoment(bins=10, history=5, uniform=0.01)
    assert set(sampler.state_dict()) == {"history", "count"}
    copy.load_state_dict(sampler.state_dict())
    t = torch.tensor([0.05, 0.05], dtype=torch.float64)
    for one in (sampler, copy):
        one.observe(t, torch.tensor([1.0, 2.0]))
    assert torch.equal(copy.history, sampler.history)
    assert not UniformTime().state_dict()


def test_second_moment_gathers_what_other_processes_saw():
    alone, together = SecondMoment(bins=2, history=2), SecondMoment(bins=2, history=2)
    t, losses = torch.tensor([0.2, 0.9]), torch.tensor([1.0, 3.0])
    alone.observe(t.repeat(2), losses.repeat(2))
    together.observe(t, losses, gather=lambda value: value.repeat(2))
    assert torch.equal(alone.history, together.history)
