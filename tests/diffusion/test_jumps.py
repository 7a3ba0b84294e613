"""Jumps along the exact path of a Gaussian mixture in one dimension, where the path is known."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.measured import loss_at
from helpers.pairs import first_fast
from torch import Tensor

from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, jump, noise_of
from diffusion_lab.diffusion.objective import (
    BatchShare,
    Flow,
    Objective,
    TeacherModel,
    UniformTime,
    V,
)
from diffusion_lab.diffusion.objective.loss import (
    Consistency,
    Denoising,
    Distillation,
    MeanFlow,
    Parts,
    Shortcut,
)
from diffusion_lab.diffusion.objective.loss.base import adaptive
from diffusion_lab.diffusion.objective.loss.consistency import heun
from diffusion_lab.diffusion.objective.loss.mean_flow import flow_target
from diffusion_lab.diffusion.sampler import Euler, FewStep, FlowMap, UniformGrid
from diffusion_lab.diffusion.sampler.time_grid import Explicit
from diffusion_lab.diffusion.schedule import Cosine, Linear, Rectified

MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], 0.4)
SCHEDULES = {
    "rectified": (Rectified(), Flow()),
    "cosine": (Cosine(), V()),
    "linear": (Linear(), V()),
}


class ExactMap:
    """The denoiser of the mixture that jumps exactly, plus `error` times a function of its input.

    x (B, 1) is float64 and differentiable once, by one step of Newton's method from the end that
    bisection finds.
    """

    conditioning = None
    self_conditioning = False
    clip = None

    def __init__(self, prediction, error=0.0):
        self.prediction = prediction
        self.error = error

    def moments(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Means (B, K) and variances (B, 1) of the modes at levels (B,)."""
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        return alpha * MIXTURE.means[:, 0], alpha**2 * MIXTURE.std**2 + sigma**2

    def cdf(self, x: Tensor, level: NoiseLevel) -> Tensor:
        means, variance = self.moments(level)
        return (MIXTURE.weights * torch.special.ndtr((x - means) / variance.sqrt())).sum(1, True)

    def density(self, x: Tensor, level: NoiseLevel) -> Tensor:
        means, variance = self.moments(level)
        bells = (-(x - means).square() / (2 * variance)).exp() / (2 * torch.pi * variance).sqrt()
        return (MIXTURE.weights * bells).sum(1, True)

    def end(self, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
        """The exact end (B, 1) of the path from x."""
        rank = self.cdf(x, here)
        low, high = torch.full_like(x, -30), torch.full_like(x, 30)
        for _ in range(32):  # to 1e-8, which the step of Newton squares
            middle = (low + high) / 2
            below = self.cdf(middle, there) < rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        found = ((low + high) / 2).detach()
        return found - (self.cdf(found, there) - rank) / self.density(found, there).detach()

    def mean(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x], (B, 1)."""
        means, variance = self.moments(level)
        logits = MIXTURE.weights.log() - (x - means).square() / (2 * variance)
        gain = level.alpha[:, None] * MIXTURE.std**2 / variance
        return (logits.softmax(1) * (MIXTURE.means[:, 0] + gain * (x - means))).sum(1, True)

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        there = level.there or level
        ratio = there.sigma / level.sigma
        share = (there.alpha - ratio * level.alpha)[:, None]
        stays = share.abs() < 1e-9
        jumped = (self.end(x, level, there) - ratio[:, None] * x) / torch.where(stays, 1.0, share)
        x0 = torch.where(stays, self.mean(x, level), jumped)
        x0 = x0 + self.error * (3 * x).sin()
        return Estimate(x0, None, self.prediction.target(x0, noise_of(x, x0, level), level))


def points(schedule, count=512):
    """States x (count, 1) of the mixture, with a start and an end of a jump for each."""
    generator = torch.Generator().manual_seed(1)  # not of the samples, which would depend on t
    draw = torch.rand(2, count, generator=generator, dtype=torch.float64) * 0.96 + 0.02
    here, there = schedule(draw.amax(0)), schedule(draw.amin(0))
    torch.manual_seed(0)
    x0, eps = MIXTURE.sample(count), torch.randn(count, 1, dtype=torch.float64)
    return x0, eps, here, there


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_of_mean_flow_is_the_exact_jump_where_the_velocity_is_exact(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, here, there = points(schedule)
    x = add_noise(x0, eps, here)
    parts = Parts(schedule, prediction, UniformTime())

    def loss(error):
        denoiser = ExactMap(prediction, error)
        mean = denoiser.mean(x, here)
        output, target = flow_target(parts, denoiser, x, mean, here, there, NOTHING)
        return (output - target).square().mean()

    assert loss(0.0) < 1e-12
    assert 1e-5 < loss(0.01) < 0.02 * loss(0.1)


def output_and_target(denoiser, schedule, x0, eps, here, there):
    """The output of a denoiser on its way from `here` to `there`, and MeanFlow's target for it."""
    parts = Parts(schedule, denoiser.prediction, UniformTime())
    return flow_target(parts, denoiser, add_noise(x0, eps, here), x0, here, there, NOTHING)


@pytest.mark.parametrize("name", first_fast(SCHEDULES))
def test_the_target_of_mean_flow_is_the_exact_jump_on_average_over_samples(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, here, there = points(schedule, count=20_000)
    denoiser = ExactMap(prediction)
    output, target = output_and_target(denoiser, schedule, x0, eps, here, there)
    error = output - target
    for features in (
        torch.ones_like(error),
        add_noise(x0, eps, here),
        here.t[:, None],
        there.t[:, None],
    ):
        update = error * features
        assert update.mean().abs() < 3.5 * update.std() / len(update) ** 0.5
    assert error.std() > 0.1


def updates_of_mean_flow(name: str, power: float) -> Tensor:
    """The gradient of each sample's loss to its own error of the exact map, (B,)."""
    schedule, prediction = SCHEDULES[name]
    parts = Parts(schedule, prediction, UniformTime())
    x0, eps, level, _ = points(schedule, count=40_000)
    error = torch.zeros(len(x0), 1, dtype=torch.float64, requires_grad=True)
    loss, generator = MeanFlow(power=power), torch.Generator().manual_seed(7)
    exact = ExactMap(prediction, error)
    losses, *_ = loss(parts, exact, x0, eps, level, NOTHING, generator)
    return torch.autograd.grad(losses.sum(), error)[0][:, 0]


@pytest.mark.parametrize("name", first_fast(SCHEDULES))
def test_the_update_of_mean_flow_is_exact_on_average_over_samples_without_weights(name):
    updates = updates_of_mean_flow(name, power=0.0)
    assert updates.mean().abs() < 3.5 * updates.std() / len(updates) ** 0.5
    assert updates.std() > 0.1


def test_the_default_weights_of_mean_flow_favour_samples_near_the_mean():
    updates = updates_of_mean_flow("rectified", power=MeanFlow().power)
    assert updates.mean().abs() > 6 * updates.std() / len(updates) ** 0.5


class Labelled(ExactMap):
    """The exact map, less 1 where it has no label; class 3 means no label."""

    class conditioning:
        labels = Classes.numbered(3)

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        estimate = super().__call__(x, level, given)
        return estimate if given.labels is not None else estimate._replace(x0=estimate.x0 - 1)


def test_the_guided_path_of_mean_flow_goes_beyond_the_estimate_without_labels():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, here, _ = points(schedule, count=4)
    x, denoiser = add_noise(x0, eps, here), Labelled(prediction)
    given = replace(NOTHING, labels=torch.tensor([0, 3, 1, 3]))
    weak = ExactMap(prediction)(x, here).x0 - 1
    expected = torch.where(given.labels[:, None] == 3, x0, x0 + 1.5 * (x0 - weak))
    found = MeanFlow(guidance=2.5).guided(denoiser, x, x0, here, given)
    torch.testing.assert_close(found, expected)
    plain = MeanFlow(guidance=2.5).guided(denoiser, x, x0, here, NOTHING)
    assert torch.equal(plain, x0)


def test_a_guided_mean_flow_that_does_not_jump_trains_the_guided_velocity():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, level, _ = points(schedule)
    parts, denoiser = Parts(schedule, prediction, UniformTime()), Labelled(prediction)
    given = replace(NOTHING, labels=torch.zeros(len(x0), dtype=torch.long))
    loss = MeanFlow(instant=1.0, guidance=2.0, power=0.0)
    losses, *_ = loss(parts, denoiser, x0, eps, level, given, None)
    x = add_noise(x0, eps, level)
    goal = x0 + (x0 - (denoiser.mean(x, level) - 1))
    velocity = prediction.target(goal, noise_of(x, goal, level), level)
    output = ExactMap(prediction)(x, level).output
    torch.testing.assert_close(losses, (output - velocity).square().mean(1))


def test_without_a_jump_the_target_of_mean_flow_is_the_denoising_target():
    schedule, prediction = SCHEDULES["cosine"]
    x0, eps, here, _ = points(schedule)
    denoiser = ExactMap(prediction, 0.1)
    _, target = output_and_target(denoiser, schedule, x0, eps, here, here)
    torch.testing.assert_close(target, prediction.target(x0, eps, here))


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_exact_half_jumps_end_where_the_exact_jump_does(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, level, _ = points(schedule)
    loss = Shortcut(share=1.0, finest=8)
    parts = Parts(schedule, prediction, UniformTime())
    generator = torch.Generator().manual_seed(2)
    here, middle, there = loss.jumps(parts, len(x0), level, generator)
    lengths = here.t - there.t
    assert {round(8 * float(length)) for length in lengths} == {2, 4, 8}
    assert torch.allclose(here.t / lengths, (here.t / lengths).round())
    x = add_noise(x0, eps, here)
    long = lengths > 3 / 8  # the halves of shorter ones are Euler steps
    exact = ExactMap(prediction)
    target = loss.halves(parts, exact, x, (here, middle, there), NOTHING)
    answer = exact(x, here.towards(there)).x0
    torch.testing.assert_close(target[long], answer[long], rtol=1e-6, atol=1e-6)
    assert (target[~long] - answer[~long]).abs().max() > 1e-3
    wrong = ExactMap(prediction, 0.05)
    target = loss.halves(parts, wrong, x, (here, middle, there), NOTHING)
    assert (target - wrong(x, here.towards(there)).x0)[long].square().mean() > 1e-4


@pytest.mark.parametrize("finest", [2, 8, 32])
def test_a_shortcut_model_knows_the_jumps_that_it_draws_and_no_others(finest):
    loss, parts = Shortcut(finest=finest), Parts(Rectified(), Flow(), UniformTime())
    level = parts.schedule(torch.ones(4000))
    here, _, there = loss.jumps(parts, 4000, level, torch.Generator().manual_seed(5))
    drawn = {(float(a), float(b)) for a, b in zip(here.t, there.t, strict=True)}
    places = [k / (2 * finest) for k in range(2 * finest + 1)]
    pairs = [(a, b) for a in places for b in places if a > b]
    start, end = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    known = {
        pair for pair, trained in zip(pairs, loss.trained_for(start, end), strict=True) if trained
    }
    assert known == drawn
    assert len(known) == finest - 1  # 1 + 2 + 4 + ... + finest / 2


def test_the_error_of_two_euler_halves_falls_with_the_square_of_their_length():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, _, _ = points(schedule)
    here = schedule(torch.linspace(0.3, 0.9, len(x0), dtype=torch.float64))
    x, exact, errors = add_noise(x0, eps, here), ExactMap(prediction), []
    parts = Parts(schedule, prediction, UniformTime())
    for finest in (32, 64, 128):
        middle, there = schedule(here.t - 1 / finest), schedule(here.t - 2 / finest)
        aim = Shortcut(finest=finest).halves(parts, exact, x, (here, middle, there), NOTHING)
        errors.append((jump(x, aim, here, there) - exact.end(x, here, there)).abs().mean())
    orders = torch.stack(errors).log2().diff().neg()
    assert ((orders > 1.8) & (orders < 2.2)).all()


def test_the_loss_of_shortcuts_is_zero_at_the_exact_map_but_for_the_euler_halves():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, level, _ = points(schedule)
    parts = Parts(schedule, prediction, UniformTime())
    # each half is 1/4 long at least: two of the exact jumps where the shortest is left out
    loss, generator = Shortcut(share=1.0, finest=8), torch.Generator().manual_seed(3)
    losses, start, _ = loss(parts, ExactMap(prediction), x0, eps, level, NOTHING, generator)
    generator.manual_seed(3)
    here, _, there = loss.jumps(parts, len(x0), level, generator)
    assert torch.equal(start.t, here.t)
    long = here.t - there.t > 3 / 8
    assert 0.2 < long.double().mean() < 0.9
    assert losses[long].max() < 1e-6
    assert losses[~long].max() > 1e-4


def test_a_shortcut_s_share_of_the_batch_jumps_and_the_rest_denoises():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, level, _ = points(schedule, count=8)
    exact = ExactMap(prediction, 0.1)
    parts = Objective(schedule, prediction, UniformTime(), Denoising())
    losses, used, _ = Shortcut(share=0.25)(parts.parts(), exact, x0, eps, level, NOTHING, None)
    plain = loss_at(parts, exact, x0, eps, level)
    torch.testing.assert_close(losses[2:], plain[2:])
    assert not torch.isclose(losses[:2], plain[:2]).any()
    assert torch.equal(used.t[2:], level.t[2:])
    assert not torch.isclose(used.t[:2], level.t[:2]).any()


@pytest.mark.parametrize(("size", "share"), [(1, 0.25), (2, 0.25), (6, 0.25), (5, 0.3), (8, 0.0)])
def test_a_shortcut_s_share_jumps_however_the_batch_is_divided(size, share):
    schedule, prediction = SCHEDULES["rectified"]
    loss = Shortcut(share=share)
    objective = Objective(schedule, prediction, UniformTime(), loss)
    counts = {"jumps": [], "calls": []}

    class Counted(ExactMap):
        def __call__(self, x, level, given=NOTHING):
            counts["calls"][-1] += 1
            if torch.is_grad_enabled():
                counts["jumps"].append(int((level.there.t < level.t).sum()))
            return Estimate(x, None, x)

    x0 = torch.zeros(size, 1, dtype=torch.float64)
    micro_batches = 120 // size
    for batch in range(2):
        for place in range(micro_batches):
            counts["calls"].append(0)
            share_of_batch, seen = BatchShare(place, micro_batches), batch * micro_batches * size
            objective(Counted(prediction), x0, share=share_of_batch, images_seen=seen)
    assert sum(counts["jumps"]) == int(share * 2 * micro_batches * size)
    assert max(counts["jumps"]) - min(counts["jumps"]) <= 1
    # of sharded weights every rank must ask for equally many
    assert set(counts["calls"]) == {3 if share else 1}


class ToClean(ExactMap):
    """A consistency model: its estimate is the exact end of the path on clean data."""

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        clean = NoiseLevel(*(torch.full_like(level.t, value) for value in (0.0, 1.0, 0.0)))
        return super().__call__(x, level.towards(clean), given)


def test_the_loss_of_exact_consistency_models_falls_with_the_square_of_the_gap():
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, level, _ = points(schedule)
    level = schedule(level.t.clamp(0.2, 0.8))
    exact = ToClean(prediction)
    x = add_noise(x0, eps, level)
    mean = exact.mean(x, level)
    noise = noise_of(x, mean, level)
    loss, sizes = Consistency(stage_images=1, steepness=0.0), []
    for stage in (2, 3, 4, 5):
        parts = Parts(schedule, prediction, UniformTime(), images_seen=stage)
        cleaner, gap = loss.cleaner(parts, level)
        assert torch.allclose(gap, torch.tensor(2.0**-stage / 2, dtype=torch.float64))
        ratio = level.sigma / level.alpha
        assert torch.allclose(cleaner.sigma / cleaner.alpha, (1 - gap) * ratio)
        losses, *_ = loss(parts, exact, mean, noise, level, NOTHING, None)
        sizes.append((losses * gap * ratio).mean())
    orders = torch.stack(sizes).log2().diff().neg()
    assert ((orders > 1.85) & (orders < 2.15)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_consistency_models_do_not_change_between_close_levels(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, level, _ = points(schedule)
    x, loss = add_noise(x0, eps, level), Consistency(stage_images=1)
    mean = ToClean(prediction).mean(x, level)  # the velocity of the path at x
    parts = Parts(schedule, prediction, UniformTime(), images_seen=2000)  # the closest levels
    cleaner, gap = loss.cleaner(parts, level)
    before = add_noise(mean, noise_of(x, mean, level), cleaner)
    sizes = []
    for error in (0.0, 0.01, 0.1):
        answer = ToClean(prediction, error)
        change = answer(x, level).x0 - answer(before, cleaner).x0
        sizes.append((change / (gap * level.sigma / level.alpha)[:, None]).square().mean())
    assert sizes[0] < 1e-6
    assert 10 * sizes[0] < sizes[1] < 0.02 * sizes[2]


@pytest.mark.parametrize("name", first_fast(SCHEDULES))
def test_the_update_of_consistency_training_is_exact_on_average_over_samples(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, level, _ = points(schedule, count=40_000)
    loss = Consistency(stage_images=1, steepness=0.0)
    parts = Parts(schedule, prediction, UniformTime(), images_seen=9)
    x = add_noise(x0, eps, level)
    cleaner, gap = loss.cleaner(parts, level)
    mean = ToClean(prediction).mean(x, level)
    drift = (noise_of(x, mean, level) - mean).clamp(-3, 3)
    means = {}
    for error in (0.0, 0.1):
        answer = ToClean(prediction, error)
        change = answer(x, level).x0 - answer(add_noise(x0, eps, cleaner), cleaner).x0
        for feature in (torch.ones_like(x), x, drift * (3 * x).cos()):
            update = change / gap[:, None] * feature
            means.setdefault(error, []).append(update.mean() / update.std() * len(update) ** 0.5)
    assert all(abs(each) < 3.5 for each in means[0.0])
    assert abs(means[0.1][-1]) > 4  # 13, 7 and 5 for the three schedules


def test_pairs_of_consistency_training_reach_clean_data_at_low_noise():
    schedule = Rectified()
    loss = Consistency(stage_images=100)
    parts = Parts(schedule, Flow(), UniformTime())
    level = schedule(torch.tensor([0.01, 0.5, 0.99]))
    _, gap = loss.cleaner(parts, level)
    u = level.sigma / level.alpha
    expected = ((1 + 8 * torch.sigmoid(-u)) / 2).clamp(max=1)
    torch.testing.assert_close(gap, expected)
    parts = replace(parts, images_seen=250)  # the third stage
    torch.testing.assert_close(loss.cleaner(parts, level)[1], (expected_at(u) / 8).clamp(max=1))


@pytest.mark.parametrize("stage", [30, 60, 2000])
def test_levels_of_consistency_training_stop_coming_closer(stage):
    loss = Consistency(stage_images=1)
    parts = Parts(Rectified(), Flow(), UniformTime(), images_seen=stage)
    level = Rectified()(torch.tensor([0.1, 0.5, 0.9]))
    cleaner, gap = loss.cleaner(parts, level)
    torch.testing.assert_close(gap, 1e-4 * expected_at(level.sigma / level.alpha))
    assert (cleaner.t < level.t).all()


def expected_at(u: Tensor) -> Tensor:
    return 1 + 8 * torch.sigmoid(-u)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_jumps_reach_the_exact_sample_in_any_number_of_calls(name, steps):
    schedule, prediction = SCHEDULES[name]
    exact, calls = ExactMap(prediction), []

    def denoise(x, level):
        calls.append(level)
        return exact(x, spread(level, len(x)))

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    samples = FlowMap(steps, UniformGrid(0.0))(denoise, noise, schedule)
    start = schedule(torch.ones(()))
    clean = NoiseLevel(*(torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0, 0.0)))
    expected = MIXTURE.transport(start.sigma * noise, start, clean)
    torch.testing.assert_close(samples, expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == steps


def spread(level: NoiseLevel, count: int) -> NoiseLevel:
    """A scalar level and the one it goes to, for each of `count` samples."""
    there = None if level.there is None else spread(level.there, count)
    values = (value.expand(count) for value in (level.t, level.alpha, level.sigma))
    return NoiseLevel(*values, there)


@pytest.mark.parametrize("grid", [UniformGrid(0.0), Explicit([1.0, 0.6, 0.3])])
def test_few_steps_of_an_exact_model_draw_from_the_mixture(grid):
    schedule, prediction = SCHEDULES["rectified"]
    exact = ToClean(prediction)
    torch.manual_seed(3)
    noise = torch.randn(4000, 1, dtype=torch.float64)
    sampler = FewStep(3, grid)
    samples = sampler(lambda x, level: exact(x, spread(level, len(x))), noise, schedule)
    exactly = MIXTURE.transport(noise, schedule(torch.ones(())), schedule(torch.zeros(())))
    assert not torch.allclose(samples, exactly, atol=0.1), "fresh noise"
    assert abs((samples < 0).double().mean() - (exactly < 0).double().mean()) < 0.03
    assert abs(samples.mean() - (MIXTURE.weights @ MIXTURE.means[:, 0])) < 0.05
    assert abs(samples.std() - exactly.std()) < 0.04


def test_mean_flow_starts_at_the_noisier_of_two_draws_and_stays_for_its_share():
    schedule, prediction = SCHEDULES["rectified"]
    parts = Parts(schedule, prediction, UniformTime())
    generator = torch.Generator().manual_seed(4)
    level, _ = UniformTime()(4000, schedule, generator)
    here, there = MeanFlow(instant=0.25).ends(parts, level, generator)
    stays = here.t == there.t
    assert (here.t >= there.t).all()
    assert abs(stays.double().mean() - 0.25) < 0.03
    assert abs((here.t - there.t)[~stays].mean() - 1 / 3) < 0.02


def test_losses_of_mean_flow_are_observed_at_the_noisier_level():
    schedule, prediction = SCHEDULES["rectified"]
    x0, _, _, _ = points(schedule)
    objective = Objective(schedule, prediction, UniformTime(), MeanFlow(instant=0.0))
    torch.manual_seed(6)
    first, _ = UniformTime()(len(x0), schedule)
    torch.manual_seed(6)
    t, _ = objective(ExactMap(prediction), x0).observed
    assert (t >= first.t).all()
    assert abs(t.mean() - 2 / 3) < 0.05


@pytest.mark.parametrize("loss", [Consistency(stage_images=1), Distillation()])
def test_both_estimates_of_a_consistency_model_have_one_dropout(loss):
    schedule, prediction = SCHEDULES["rectified"]
    x0, eps, level, _ = points(schedule, count=8)
    masks = []

    class Dropping(ToClean):
        def __call__(self, x, level, given=NOTHING):
            masks.append(torch.rand(8))
            return super().__call__(x, level, given)

    teacher = TeacherModel("nowhere", None, None)
    teacher.open(lambda labels: ExactMap(prediction))
    parts = Parts(schedule, prediction, UniformTime(), teacher)
    for _ in range(2):
        loss(parts, Dropping(prediction), x0, eps, level, NOTHING, None)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_adaptive_weights_keep_the_value_and_scale_the_gradient():
    squares = torch.tensor([4.0, 9.0], requires_grad=True)
    adaptive(squares, 0.5, 0.0).sum().backward()
    assert squares.grad.tolist() == pytest.approx([0.5, 1 / 3])
    assert adaptive(squares, 0.0, 1.0).tolist() == [4, 9]


class Straight:
    """The denoiser whose paths are straight lines between the pairs of a teacher."""

    clip = None

    def __init__(self, error=0.0):
        self.error = error

    def __call__(self, x, level, given=NOTHING) -> Estimate:
        low, high = torch.full_like(x, -9), torch.full_like(x, 9)
        for _ in range(36):
            middle = (low + high) / 2
            below = add_noise(ends_of(middle), middle, level) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x0 = ends_of((low + high) / 2) + self.error * (3 * x).sin()
        return Estimate(x0, None, Flow().target(x0, noise_of(x, x0, level), level))


def ends_of(eps: Tensor) -> Tensor:
    """The samples that a teacher draws from noise."""
    ends = [Rectified()(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0)]
    return MIXTURE.transport(eps, *ends)


def test_the_loss_of_reflow_is_zero_at_the_straight_map_and_one_step_draws_the_pairs():
    schedule = Rectified()
    _, eps, level, _ = points(schedule, count=16)
    x0 = ends_of(eps)
    parts = Objective(schedule, Flow(), UniformTime(), Denoising())
    losses = [loss_at(parts, Straight(e), x0, eps, level).mean() for e in (0.0, 0.01, 0.1)]
    assert losses[0] < 1e-6
    assert 1e-6 < losses[1] < 0.02 * losses[2]
    straight = Straight()
    drawn = Euler(1, UniformGrid(0.0))(
        lambda x, level: straight(x, spread(level, len(x))), eps, schedule
    )
    torch.testing.assert_close(drawn, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_of_a_teacher_s_step_falls_with_the_cube_of_the_gap(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, _, _ = points(schedule)
    here = schedule(torch.linspace(0.3, 0.7, len(x0), dtype=torch.float64))
    x, exact, errors = add_noise(x0, eps, here), ExactMap(prediction), []
    for gap in (0.1, 0.05, 0.025):
        there = schedule.at_logsnr(here.logsnr - 2 * math.log(1 - gap))
        moved = heun(exact, x, here, there)
        errors.append((moved - exact.end(x, here, there)).abs().mean())
    orders = torch.stack(errors).log2().diff().neg()
    assert ((orders > 2.8) & (orders < 3.3)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_of_distillation_is_zero_at_the_exact_consistency_model(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, level, _ = points(schedule)
    teacher = TeacherModel("nowhere", None, None)
    teacher.open(lambda labels: ExactMap(prediction))
    loss = Distillation(gap=1e-3)
    parts = Parts(schedule, prediction, UniformTime(), teacher)
    sizes = [
        loss(parts, ToClean(prediction, error), x0, eps, level, NOTHING, None)[0].mean()
        for error in (0.0, 0.01, 0.1)
    ]
    assert sizes[0] < 1e-6
    assert 100 * sizes[0] < sizes[1] < 0.2 * sizes[2]
    objective = Objective(schedule, prediction, UniformTime(), loss, teacher=teacher)
    assert copy.deepcopy(objective).teacher is teacher
