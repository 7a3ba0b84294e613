"""Jumps along the exact path of a Gaussian mixture in one dimension, where the path is known."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.exact_denoiser import CLEAN
from helpers.exact_map import (
    MIXTURE,
    PATHS,
    STRAIGHT,
    ExactMap,
    Labelled,
    ToClean,
    assert_order,
    deviation,
    every_path,
    first_path,
    points,
    spread,
    updates,
)
from torch import Tensor

from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.noise import add_noise, jump, noise_of
from diffusion_lab.diffusion.objective import (
    BatchShare,
    Flow,
    Objective,
    TeacherModel,
    UniformTime,
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
from diffusion_lab.diffusion.schedule import Rectified


@every_path
def test_the_target_of_mean_flow_is_the_exact_jump_where_the_velocity_is_exact(parts):
    x0, eps, here, there = points(parts.schedule)
    x = add_noise(x0, eps, here)

    def loss(error):
        denoiser = ExactMap(parts.prediction, error)
        mean = MIXTURE.denoise(x, here).x0
        output, target = flow_target(parts, denoiser, x, mean, here, there, NOTHING)
        return (output - target).square().mean()

    assert loss(0.0) < 1e-12
    assert 1e-5 < loss(0.01) < 0.02 * loss(0.1)


@first_path
def test_the_target_of_mean_flow_is_the_exact_jump_on_average_over_samples(parts):
    x0, eps, here, there = points(parts.schedule, count=20_000)
    x, exact = add_noise(x0, eps, here), ExactMap(parts.prediction)
    output, target = flow_target(parts, exact, x, x0, here, there, NOTHING)
    error = output - target
    for feature in (torch.ones_like(error), x, here.t[:, None], there.t[:, None]):
        assert abs(deviation(error * feature)) < 3.5
    assert error.std() > 0.1


@first_path
def test_the_update_of_mean_flow_is_exact_on_average_over_samples_without_weights(parts):
    found = updates(MeanFlow(power=0.0), ExactMap(parts.prediction), parts, 40_000)
    assert abs(deviation(found)) < 3.5
    assert found.std() > 0.1


def test_the_default_weights_of_mean_flow_favour_samples_near_the_mean():
    found = updates(MeanFlow(), ExactMap(STRAIGHT.prediction), STRAIGHT, 40_000)
    assert abs(deviation(found)) > 6


def test_the_guided_path_of_mean_flow_goes_beyond_the_estimate_without_labels():
    x0, eps, here, _ = points(STRAIGHT.schedule, count=4)
    x, denoiser = add_noise(x0, eps, here), Labelled(STRAIGHT.prediction)
    given = Given(torch.tensor([0, 3, 1, 3]))
    weak = denoiser(x, here).x0
    expected = torch.where(given.labels[:, None] == 3, x0, x0 + 1.5 * (x0 - weak))
    found = MeanFlow(guidance=2.5).guided(denoiser, x, x0, here, given)
    torch.testing.assert_close(found, expected)
    plain = MeanFlow(guidance=2.5).guided(denoiser, x, x0, here, NOTHING)
    assert torch.equal(plain, x0)


def test_a_guided_mean_flow_that_does_not_jump_trains_the_guided_velocity():
    schedule, prediction = STRAIGHT.schedule, STRAIGHT.prediction
    x0, eps, level, _ = points(schedule)
    denoiser, given = Labelled(prediction), Given(torch.zeros(len(x0), dtype=torch.long))
    loss = MeanFlow(instant=1.0, guidance=2.0, power=0.0)
    losses, *_ = loss(STRAIGHT, denoiser, x0, eps, level, given, None)
    x = add_noise(x0, eps, level)
    goal = x0 + (x0 - (MIXTURE.denoise(x, level).x0 - 1))
    velocity = prediction.target(goal, noise_of(x, goal, level), level)
    output = ExactMap(prediction)(x, level).output
    torch.testing.assert_close(losses, (output - velocity).square().mean(1))


def test_without_a_jump_the_target_of_mean_flow_is_the_denoising_target():
    parts = PATHS["cosine"]
    x0, eps, here, _ = points(parts.schedule)
    x, denoiser = add_noise(x0, eps, here), ExactMap(parts.prediction, 0.1)
    _, target = flow_target(parts, denoiser, x, x0, here, here, NOTHING)
    torch.testing.assert_close(target, parts.prediction.target(x0, eps, here))


@every_path
def test_two_exact_half_jumps_end_where_the_exact_jump_does(parts):
    x0, eps, level, _ = points(parts.schedule)
    loss = Shortcut(share=1.0, finest=8)
    here, middle, there = loss.jumps(parts, len(x0), level, torch.Generator().manual_seed(2))
    lengths = here.t - there.t
    assert {round(8 * float(length)) for length in lengths} == {2, 4, 8}
    assert torch.allclose(here.t / lengths, (here.t / lengths).round())
    x = add_noise(x0, eps, here)
    long = lengths > 3 / 8  # the halves of shorter ones are Euler steps
    exact = ExactMap(parts.prediction)
    target = loss.halves(parts, exact, x, (here, middle, there), NOTHING)
    answer = exact(x, here.towards(there)).x0
    torch.testing.assert_close(target[long], answer[long], rtol=1e-6, atol=1e-6)
    assert (target[~long] - answer[~long]).abs().max() > 1e-3
    wrong = ExactMap(parts.prediction, 0.05)
    target = loss.halves(parts, wrong, x, (here, middle, there), NOTHING)
    assert (target - wrong(x, here.towards(there)).x0)[long].square().mean() > 1e-4


@pytest.mark.parametrize("finest", [2, 8, 32])
def test_a_shortcut_model_knows_the_jumps_that_it_draws_and_no_others(finest):
    loss, level = Shortcut(finest=finest), STRAIGHT.schedule(torch.ones(4000))
    here, _, there = loss.jumps(STRAIGHT, 4000, level, torch.Generator().manual_seed(5))
    drawn = {(float(a), float(b)) for a, b in zip(here.t, there.t, strict=True)}
    places = [k / (2 * finest) for k in range(2 * finest + 1)]
    pairs = [(a, b) for a in places for b in places if a > b]
    start, end = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    trained = loss.trained_for(start, end)
    known = {pair for pair, is_known in zip(pairs, trained, strict=True) if is_known}
    assert known == drawn
    assert len(known) == finest - 1  # 1 + 2 + 4 + ... + finest / 2


def test_the_error_of_two_euler_halves_falls_with_the_square_of_their_length():
    schedule = STRAIGHT.schedule
    x0, eps, _, _ = points(schedule)
    here = schedule(torch.linspace(0.3, 0.9, len(x0), dtype=torch.float64))
    x, exact, errors = add_noise(x0, eps, here), ExactMap(STRAIGHT.prediction), []
    for finest in (32, 64, 128):
        middle, there = schedule(here.t - 1 / finest), schedule(here.t - 2 / finest)
        aim = Shortcut(finest=finest).halves(STRAIGHT, exact, x, (here, middle, there), NOTHING)
        errors.append((jump(x, aim, here, there) - MIXTURE.transport(x, here, there)).abs().mean())
    assert_order(errors, 1.8, 2.2)


def test_the_loss_of_shortcuts_is_zero_at_the_exact_map_but_for_the_euler_halves():
    x0, eps, level, _ = points(STRAIGHT.schedule)
    # each half is 1/4 long at least: two of the exact jumps where the shortest is left out
    loss, generator = Shortcut(share=1.0, finest=8), torch.Generator().manual_seed(3)
    exact = ExactMap(STRAIGHT.prediction)
    losses, start, _ = loss(STRAIGHT, exact, x0, eps, level, NOTHING, generator)
    here, _, there = loss.jumps(STRAIGHT, len(x0), level, generator.manual_seed(3))
    assert torch.equal(start.t, here.t)
    long = here.t - there.t > 3 / 8
    assert 0.2 < long.double().mean() < 0.9
    assert losses[long].max() < 1e-6
    assert losses[~long].max() > 1e-4


def test_a_shortcut_s_share_of_the_batch_jumps_and_the_rest_denoises():
    x0, eps, level, _ = points(STRAIGHT.schedule, count=8)
    exact = ExactMap(STRAIGHT.prediction, 0.1)
    losses, used, _ = Shortcut(share=0.25)(STRAIGHT, exact, x0, eps, level, NOTHING, None)
    plain = Denoising()(STRAIGHT, exact, x0, eps, level, NOTHING, None).minimised
    torch.testing.assert_close(losses[2:], plain[2:])
    assert not torch.isclose(losses[:2], plain[:2]).any()
    assert torch.equal(used.t[2:], level.t[2:])
    assert not torch.isclose(used.t[:2], level.t[:2]).any()


@pytest.mark.parametrize(("size", "share"), [(1, 0.25), (2, 0.25), (6, 0.25), (5, 0.3), (8, 0.0)])
def test_a_shortcut_s_share_jumps_however_the_batch_is_divided(size, share):
    objective = Objective(Rectified(), Flow(), UniformTime(), Shortcut(share=share))
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
            objective(Counted(Flow()), x0, share=share_of_batch, images_seen=seen)
    assert sum(counts["jumps"]) == int(share * 2 * micro_batches * size)
    assert max(counts["jumps"]) - min(counts["jumps"]) <= 1
    # of sharded weights every rank must ask for equally many
    assert set(counts["calls"]) == {3 if share else 1}


def test_the_loss_of_exact_consistency_models_falls_with_the_square_of_the_gap():
    schedule = STRAIGHT.schedule
    x0, eps, level, _ = points(schedule)
    level = schedule(level.t.clamp(0.2, 0.8))
    exact, x = ToClean(STRAIGHT.prediction), add_noise(x0, eps, level)
    mean = MIXTURE.denoise(x, level).x0
    noise = noise_of(x, mean, level)
    loss, sizes = Consistency(stage_images=1, steepness=0.0), []
    for stage in (2, 3, 4, 5):
        parts = replace(STRAIGHT, images_seen=stage)
        cleaner, gap = loss.cleaner(parts, level)
        assert torch.allclose(gap, torch.tensor(2.0**-stage / 2, dtype=torch.float64))
        ratio = level.sigma / level.alpha
        assert torch.allclose(cleaner.sigma / cleaner.alpha, (1 - gap) * ratio)
        losses, *_ = loss(parts, exact, mean, noise, level, NOTHING, None)
        sizes.append((losses * gap * ratio).mean())
    assert_order(sizes, 1.85, 2.15)


@every_path
def test_exact_consistency_models_do_not_change_between_close_levels(parts):
    x0, eps, level, _ = points(parts.schedule)
    x = add_noise(x0, eps, level)
    mean = MIXTURE.denoise(x, level).x0  # the velocity of the path at x
    closest = replace(parts, images_seen=2000)
    cleaner, gap = Consistency(stage_images=1).cleaner(closest, level)
    before = add_noise(mean, noise_of(x, mean, level), cleaner)
    sizes = []
    for error in (0.0, 0.01, 0.1):
        answer = ToClean(parts.prediction, error)
        change = answer(x, level).x0 - answer(before, cleaner).x0
        sizes.append((change / (gap * level.sigma / level.alpha)[:, None]).square().mean())
    assert sizes[0] < 1e-6
    assert 10 * sizes[0] < sizes[1] < 0.02 * sizes[2]


@first_path
def test_the_update_of_consistency_training_is_exact_on_average_over_samples(parts):
    x0, eps, level, _ = points(parts.schedule, count=40_000)
    loss = Consistency(stage_images=1, steepness=0.0)
    x = add_noise(x0, eps, level)
    cleaner, gap = loss.cleaner(replace(parts, images_seen=9), level)
    mean = MIXTURE.denoise(x, level).x0
    drift = (noise_of(x, mean, level) - mean).clamp(-3, 3)
    means = {}
    for error in (0.0, 0.1):
        answer = ToClean(parts.prediction, error)
        change = answer(x, level).x0 - answer(add_noise(x0, eps, cleaner), cleaner).x0
        features = torch.ones_like(x), x, drift * (3 * x).cos()
        means[error] = [abs(deviation(change / gap[:, None] * each)) for each in features]
    assert max(means[0.0]) < 3.5
    assert means[0.1][-1] > 4  # 13, 7 and 5 for the three schedules


def test_pairs_of_consistency_training_reach_clean_data_and_come_closer_up_to_a_limit():
    level = STRAIGHT.schedule(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]))
    start = 1 + 8 * torch.sigmoid(-level.sigma / level.alpha)
    loss = Consistency(stage_images=100)
    for images_seen, expected in ((0, start / 2), (250, start / 8)):  # the first and third stage
        cleaner, gap = loss.cleaner(replace(STRAIGHT, images_seen=images_seen), level)
        torch.testing.assert_close(gap, expected.clamp(max=1))
    for stage in (30, 60, 2000):
        cleaner, gap = loss.cleaner(replace(STRAIGHT, images_seen=100 * stage), level)
        torch.testing.assert_close(gap, 1e-4 * start)
        assert (cleaner.t < level.t).all()


@every_path
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_jumps_reach_the_exact_sample_in_any_number_of_calls(steps, parts):
    exact, calls = ExactMap(parts.prediction), []

    def denoise(x, level):
        calls.append(level)
        return exact(x, spread(level, len(x)))

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    samples = FlowMap(steps, UniformGrid(0.0))(denoise, noise, parts.schedule)
    start = parts.schedule(torch.ones(()))
    expected = MIXTURE.transport(start.sigma * noise, start, CLEAN)
    torch.testing.assert_close(samples, expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == steps


@pytest.mark.parametrize("grid", [UniformGrid(0.0), Explicit([1.0, 0.6, 0.3])])
def test_few_steps_of_an_exact_model_draw_from_the_mixture(grid):
    schedule, exact = STRAIGHT.schedule, ToClean(STRAIGHT.prediction)
    torch.manual_seed(3)
    noise = torch.randn(4000, 1, dtype=torch.float64)
    samples = FewStep(3, grid)(lambda x, level: exact(x, spread(level, len(x))), noise, schedule)
    exactly = MIXTURE.transport(noise, schedule(torch.ones(())), CLEAN)
    assert not torch.allclose(samples, exactly, atol=0.1), "fresh noise"
    assert abs((samples < 0).double().mean() - (exactly < 0).double().mean()) < 0.03
    assert abs(samples.mean() - (MIXTURE.weights @ MIXTURE.means[:, 0])) < 0.05
    assert abs(samples.std() - exactly.std()) < 0.04


def test_mean_flow_starts_at_the_noisier_of_two_draws_and_stays_for_its_share():
    generator = torch.Generator().manual_seed(4)
    level, _ = UniformTime()(4000, STRAIGHT.schedule, generator)
    here, there = MeanFlow(instant=0.25).ends(STRAIGHT, level, generator)
    stays = here.t == there.t
    assert (here.t >= there.t).all()
    assert abs(stays.double().mean() - 0.25) < 0.03
    assert abs((here.t - there.t)[~stays].mean() - 1 / 3) < 0.02


def test_losses_of_mean_flow_are_observed_at_the_noisier_level():
    x0, *_ = points(STRAIGHT.schedule)
    objective = Objective(Rectified(), Flow(), UniformTime(), MeanFlow(instant=0.0))
    torch.manual_seed(6)
    first, _ = UniformTime()(len(x0), Rectified())
    torch.manual_seed(6)
    t, _ = objective(ExactMap(Flow()), x0).observed
    assert (t >= first.t).all()
    assert abs(t.mean() - 2 / 3) < 0.05


def taught(parts: Parts) -> Parts:
    """The same parts with the exact map of the mixture as their teacher."""
    teacher = TeacherModel("nowhere", None, None)
    teacher.open(lambda labels: ExactMap(parts.prediction))
    return replace(parts, teacher=teacher)


@pytest.mark.parametrize("loss", [Consistency(stage_images=1), Distillation()])
def test_both_estimates_of_a_consistency_model_have_one_dropout(loss):
    x0, eps, level, _ = points(STRAIGHT.schedule, count=8)
    masks = []

    class Dropping(ToClean):
        def __call__(self, x, level, given=NOTHING):
            masks.append(torch.rand(8))
            return super().__call__(x, level, given)

    for _ in range(2):
        loss(taught(STRAIGHT), Dropping(Flow()), x0, eps, level, NOTHING, None)
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
    return MIXTURE.transport(eps, Rectified()(torch.ones(())), CLEAN)


def test_the_loss_of_reflow_is_zero_at_the_straight_map_and_one_step_draws_the_pairs():
    _, eps, level, _ = points(Rectified(), count=16)
    x0 = ends_of(eps)
    losses = [
        Denoising()(STRAIGHT, Straight(error), x0, eps, level, NOTHING, None).minimised.mean()
        for error in (0.0, 0.01, 0.1)
    ]
    assert losses[0] < 1e-6
    assert 1e-6 < losses[1] < 0.02 * losses[2]
    straight = Straight()
    drawn = Euler(1, UniformGrid(0.0))(
        lambda x, level: straight(x, spread(level, len(x))), eps, Rectified()
    )
    torch.testing.assert_close(drawn, x0, rtol=1e-5, atol=1e-5)


@every_path
def test_the_error_of_a_teacher_s_step_falls_with_the_cube_of_the_gap(parts):
    schedule = parts.schedule
    x0, eps, _, _ = points(schedule)
    here = schedule(torch.linspace(0.3, 0.7, len(x0), dtype=torch.float64))
    x, exact, errors = add_noise(x0, eps, here), ExactMap(parts.prediction), []
    for gap in (0.1, 0.05, 0.025):
        there = schedule.at_logsnr(here.logsnr - 2 * math.log(1 - gap))
        moved = heun(exact, x, here, there)
        errors.append((moved - MIXTURE.transport(x, here, there)).abs().mean())
    assert_order(errors, 2.8, 3.3)


@every_path
def test_the_loss_of_distillation_is_zero_at_the_exact_consistency_model(parts):
    x0, eps, level, _ = points(parts.schedule)
    loss, parts = Distillation(gap=1e-3), taught(parts)
    sizes = [
        loss(parts, ToClean(parts.prediction, error), x0, eps, level, NOTHING, None)[0].mean()
        for error in (0.0, 0.01, 0.1)
    ]
    assert sizes[0] < 1e-6
    assert 100 * sizes[0] < sizes[1] < 0.2 * sizes[2]


def test_copies_of_an_objective_share_its_teacher():
    teacher = taught(STRAIGHT).teacher
    objective = Objective(Rectified(), Flow(), UniformTime(), Distillation(), teacher=teacher)
    assert copy.deepcopy(objective).teacher is teacher
