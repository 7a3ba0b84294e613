"""Improved MeanFlow, alpha-Flow and Lagrangian self-distillation at the exact map of a mixture."""

from dataclasses import replace

import pytest
import torch
from helpers.compositions import composed
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
    updates,
)
from helpers.refusals import refused
from torch import Tensor

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.common.forward_mode import derivative
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.guidance import EmbeddedGuidance
from diffusion_lab.diffusion.noise import add_noise, jump, noise_of
from diffusion_lab.diffusion.objective import Flow
from diffusion_lab.diffusion.objective.loss import (
    AlphaFlow,
    ContinuousConsistency,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
)
from diffusion_lab.diffusion.objective.loss.lagrangian import output_of
from diffusion_lab.diffusion.objective.loss.mean_flow import flow_target, halted, labelled
from diffusion_lab.diffusion.schedule import Rectified

NEARLY = 65  # images of 100, after which alpha is 0.023
FLOOR = 1e6  # so large that all tangents of sCM are divided by it, not by their own size
LOSSES = {  # with the exact map of each, and what its updates are divided by
    "improved_mean_flow": (ImprovedMeanFlow(power=0.0), ExactMap, 1),
    "alpha_flow": (AlphaFlow(power=0.0, end_images=100), ExactMap, 1),
    "scm": (ContinuousConsistency(warmup_images=1, floor=FLOOR), ToClean, FLOOR),
}


@first_path
@pytest.mark.parametrize("kind", LOSSES)
def test_the_update_at_the_exact_map_is_zero_on_average_over_samples(kind, parts):
    loss, exact, divisor = LOSSES[kind]
    parts = replace(parts, images_seen=NEARLY)
    found = divisor * updates(loss, exact(parts.prediction), parts, 20_000)
    assert abs(deviation(found)) < 3.5
    assert found.std() > 0.1


@every_path
def test_the_exact_loss_of_improved_mean_flow_is_that_of_the_exact_velocity(parts):
    prediction = parts.prediction
    x0, eps, level, _ = points(parts.schedule)
    loss, generator = ImprovedMeanFlow(power=0.0), torch.Generator().manual_seed(1)
    losses, here, _ = loss(parts, ExactMap(prediction), x0, eps, level, NOTHING, generator)
    _, there = loss.ends(parts, level, generator.manual_seed(1))
    x = add_noise(x0, eps, here)
    # the targets differ as they do for an output that does not change along the path
    ours, theirs = (
        flow_target(parts, Constant(prediction), x, goal, here, there, NOTHING)[1]
        for goal in (x0, MIXTURE.denoise(x, here).x0)
    )
    torch.testing.assert_close(losses, (ours - theirs).square().mean(1))
    if parts is STRAIGHT:  # where these are the velocities themselves
        torch.testing.assert_close(ours, eps - x0)


class Constant(ExactMap):
    """A network whose output is always 0."""

    def __call__(self, x: Tensor, level, given=NOTHING) -> Estimate:
        output = torch.zeros_like(x)
        return Estimate(self.prediction.to_x0(output, x, level), None, output)


@every_path
def test_the_loss_of_exact_jumps_is_zero_for_lagrangian_self_distillation(parts):
    x0, eps, level, _ = points(parts.schedule)
    sizes = []
    for error in (0.0, 0.01, 0.1):
        exact, generator = ExactMap(parts.prediction, error), torch.Generator().manual_seed(1)
        losses = Lagrangian(instant=0.0)(parts, exact, x0, eps, level, NOTHING, generator)
        sizes.append(losses.minimised.mean())
    assert sizes[0] < 1e-12
    assert 1e-6 < sizes[1] < 0.02 * sizes[2]


class Recorded(ExactMap):
    """The exact map, with the number of samples of each call."""

    def __init__(self, prediction):
        super().__init__(prediction)
        self.asked: list[int] = []

    def __call__(self, x: Tensor, level, given=NOTHING) -> Estimate:
        self.asked.append(len(x))
        return super().__call__(x, level, given)


@pytest.mark.parametrize(
    ("place", "count", "asked", "jumps"),
    [(0, 8, [2, 2, 6], 2), (0, 2, [1, 1, 2], 0), (2, 2, [1, 1, 1], 1), (3, 1, [1, 1, 1], 1)],
)
def test_a_quarter_of_all_samples_jumps_and_the_rest_is_denoised(place, count, asked, jumps):
    parts = replace(PATHS["cosine"], place=place)
    exact = Recorded(parts.prediction)
    x0, eps, level, _ = points(parts.schedule, count=count)
    losses, here, _ = Lagrangian()(parts, exact, x0, eps, level, NOTHING, None)
    assert exact.asked == asked  # jumps, their ends, and those that stay
    answer = exact(add_noise(x0, eps, here), here.towards(here)).output
    denoised = (answer - parts.prediction.target(x0, eps, here)).square().mean(1)
    denoised[:jumps] = 0  # as that of an exact jump is
    torch.testing.assert_close(losses, denoised)
    assert torch.equal(here.t[jumps:], level.t[jumps:])
    assert Lagrangian().extra_passes == 4 * 0.25


@every_path
def test_the_output_of_a_velocity_is_the_target_of_the_pair_that_moves_so(parts):
    x0, eps, level, _ = points(parts.schedule)
    x, change = derivative(
        lambda t: add_noise(x0, eps, parts.schedule(t)), (level.t,), (torch.ones_like(level.t),)
    )
    found = output_of(parts, x, change, level)
    torch.testing.assert_close(found, parts.prediction.target(x0, eps, level))


def test_alpha_falls_along_a_sigmoid_from_one_to_zero():
    loss = AlphaFlow(start_images=100, end_images=300, steepness=10.0)
    found = [loss.alpha(seen) for seen in (0, 100, 150, 200, 250, 299, 400)]
    assert found[:1] + found[-1:] == [1, 0]
    sigmoid = [1 / (1 + 2.718281828**x) for x in (-2.5, 0, 2.5)]
    assert found[2:5] == pytest.approx(sigmoid)
    assert AlphaFlow().alpha(10**15) == 0
    with refused("end_images", "start_images=5", by=ValueError):
        AlphaFlow(start_images=5, end_images=5)


def test_alpha_flow_begins_as_flow_matching_of_jumps_and_ends_as_mean_flow():
    parts, generator = PATHS["cosine"], torch.Generator()
    x0, eps, level, _ = points(parts.schedule)
    exact = ExactMap(parts.prediction, 0.1)

    def losses_of(loss, images_seen):
        now = replace(parts, images_seen=images_seen)
        return loss(now, exact, x0, eps, level, NOTHING, generator.manual_seed(3))

    ended = losses_of(AlphaFlow(end_images=100), 100)[0]
    torch.testing.assert_close(ended, losses_of(MeanFlow(), 0)[0])
    first, here, _ = losses_of(AlphaFlow(power=0.0), 0)
    _, there = AlphaFlow().ends(parts, level, generator.manual_seed(3))
    output = exact(add_noise(x0, eps, here), here.towards(there)).output
    expected = (output - parts.prediction.target(x0, eps, here)).square().mean(1)
    torch.testing.assert_close(first, expected)


@every_path
def test_the_error_of_a_halted_jump_falls_with_the_square_of_alpha_on_the_exact_path(parts):
    schedule, exact = parts.schedule, ExactMap(parts.prediction)
    x0, eps, here, there = points(schedule)
    here, there = schedule(here.t.clamp(0.4, 0.8)), schedule(there.t.clamp(0.1, 0.3))
    x = add_noise(x0, eps, here)
    mean, end, errors = MIXTURE.denoise(x, here).x0, MIXTURE.transport(x, here, there), []
    for alpha in (0.08, 0.04, 0.02):
        goal = halted(parts, exact, alpha, x, mean, here, there, NOTHING)
        errors.append((jump(x, goal, here, there) - end).abs().mean())
    assert_order(errors, 1.8, 2.2)
    assert torch.equal(halted(parts, exact, 0.5, x, mean, here, here, NOTHING), mean)


class Told(Labelled):
    """The map that moves by the logarithm of the scale that it is told."""

    def __call__(self, x: Tensor, level, given=NOTHING) -> Estimate:
        estimate = super().__call__(x, level, given)
        more = 0 if given.scale is None else given.scale.log().reshape(-1, 1)
        return estimate._replace(x0=estimate.x0 + more)


def test_scales_have_a_density_of_their_inverse_and_are_one_without_a_label():
    x, loss, denoiser = torch.zeros(9000, 1), ImprovedMeanFlow(guidance=8.0), Told(Flow())
    given = Given(torch.tensor([0, 1, 3]).repeat(3000))  # 3 is no label
    scales = loss.scales(labelled(denoiser, given, x), torch.Generator().manual_seed(0))
    assert (scales[2::3] == 1).all()
    kept = scales.view(-1, 3)[:, :2].log() / torch.tensor(8.0).log()
    assert kept.min() < 0.01 < 0.99 < kept.max()
    assert kept.mean() == pytest.approx(0.5, abs=0.02)
    assert (loss.scales(labelled(denoiser, NOTHING, x), None) == 1).all()


def test_the_path_that_is_trained_is_the_one_that_a_guided_estimate_follows():
    prediction = STRAIGHT.prediction
    x0, eps, level, _ = points(STRAIGHT.schedule, count=3)
    labels, x = torch.tensor([0, 1, 2]), add_noise(x0, eps, level)
    scales = []

    class Guided(ExactMap):
        """The strong estimate is the mean, and the weak one is 1 below it."""

        conditioning = Labelled.conditioning

        def __call__(self, x, level, given=NOTHING):
            own = MIXTURE.denoise(x, level).x0 - 1
            if given.labels is None:
                assert given.scale is None
                return Estimate(own)
            scales.append(given.scale)
            own = own + given.scale[:, None]
            return Estimate(own, None, prediction.target(own, noise_of(x, own, level), level))

    loss = ImprovedMeanFlow(instant=1.0, guidance=4.0, power=0.0)
    losses, *_ = loss(STRAIGHT, Guided(prediction), x0, eps, level, Given(labels), None)
    goal = x0 - 1 + scales[0][:, None]  # moved by as much as the estimate
    output = Guided(prediction)(x, level, Given(labels, scale=scales[0])).output
    velocity = prediction.target(goal, noise_of(x, goal, level), level)
    torch.testing.assert_close(losses, (output - velocity).square().mean(1))


def test_embedded_guidance_tells_the_scale_inside_its_interval_in_one_call():
    told = []

    class Recording(Told):
        def __call__(self, x, level, given=NOTHING):
            told.append(given.scale)
            return Estimate(x)

    model, x = Recording(Flow()), torch.zeros(2, 1)
    guidance = EmbeddedGuidance(scale=3.0, interval=[0.5, 2.0])
    denoise = guidance.bind(model, torch.tensor([0, 1]))
    denoise(x, Rectified()(torch.tensor(0.5)))
    denoise(x, Rectified()(torch.tensor([0.5, 0.9])))
    guidance.bind(model, None)(x, Rectified()(torch.tensor(0.5)))
    assert [None if each is None else each.tolist() for each in told] == [[3], [3, 1], None]
    for wrong in ({"rescale": 0.5}, {"weak_run": "run"}):
        with refused("rescale=0", by=ValueError):
            EmbeddedGuidance(**wrong)


def test_a_network_learns_to_tell_scales_apart_and_its_derivative_at_the_end_is_exact():
    torch.manual_seed(0)
    few = ["objective=improved_mean_flow", "objective.loss.guidance=8", "backbone=dit"]
    small = ["backbone.depth=2", "backbone.width=32", "backbone.heads=2", "backbone.patch=4"]
    model = build_model(composed("train", *few, *small), (1, 8, 8), Classes.numbered(3))
    denoiser, schedule = model.denoiser, model.schedule
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    here, end = schedule(torch.tensor([0.9, 0.7])), torch.tensor([0.3, 0.2], dtype=torch.float64)

    def output(t, scale=None):
        return denoiser(x, here.towards(schedule(t)), Given(labels, scale=scale)).output

    plain, scaled = output(end), output(end, torch.tensor([1.0, 3.0]))
    assert torch.equal(plain[0], scaled[0])
    assert not torch.allclose(plain[1], scaled[1], atol=1e-3)
    _, found = derivative(output, (end,), (torch.ones_like(end),))
    expected = (output(end + 1e-3) - output(end - 1e-3)) / 2e-3
    assert expected.norm() > 0.1 * plain.norm()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


@every_path
def test_an_exact_consistency_model_has_no_tangent_where_the_velocity_is_exact(parts):
    x0, eps, level, _ = points(parts.schedule)
    parts, loss = replace(parts, images_seen=100), ContinuousConsistency(warmup_images=100)
    x = add_noise(x0, eps, level)
    mean, sizes = MIXTURE.denoise(x, level).x0, []
    noise = noise_of(x, mean, level)
    for error in (0.0, 0.01, 0.1):
        answer = ToClean(parts.prediction, error)
        losses = loss(parts, answer, mean, noise, level, NOTHING, None).minimised
        sizes.append(losses.mean().sqrt())
    assert sizes[0] < 1e-4
    assert 10 * sizes[0] < 0.01 < sizes[1] < sizes[2] < 1


@pytest.mark.parametrize("seen", [0, 50, 100, 1000])
def test_the_tangent_is_that_of_the_paper_on_its_path(seen):
    parts = replace(PATHS["cosine"], images_seen=seen)
    x0, eps, level, _ = points(parts.schedule)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).double()

    class Network:
        def __call__(self, x, level, given):
            angle = torch.atan2(level.sigma, level.alpha)[:, None]
            output = net(torch.cat([x, angle], 1))
            return Estimate(parts.prediction.to_x0(output, x, level), None, output)

    loss = ContinuousConsistency(warmup_images=100, floor=0.1)
    found = loss(parts, Network(), x0, eps, level, NOTHING, None).minimised
    found.sum().backward()
    ours = [each.grad.clone() for each in net.parameters()]
    net.zero_grad()

    # arXiv:2410.11081, algorithm 1, with sigma_d = 1 and data x0, whose F is our v
    angle, r = torch.atan2(level.sigma, level.alpha)[:, None], min(1.0, seen / 100)
    x, moves = angle.cos() * x0 + angle.sin() * eps, angle.cos() * eps - angle.sin() * x0
    output = lambda x, angle: net(torch.cat([x, angle], 1))  # noqa: E731
    old, change = torch.func.jvp(output, (x, angle), (moves, torch.ones_like(angle)))
    tangent = -(angle.cos() ** 2) * (old - moves)
    tangent = tangent - r * angle.cos() * angle.sin() * (x + change)
    size = tangent.square().mean(1, keepdim=True).sqrt()
    tangent = (tangent / (size + 0.1)).detach()
    theirs = (output(x, angle) - old.detach() - tangent).square().mean(1)
    theirs.sum().backward()
    torch.testing.assert_close(found.detach(), theirs.detach())
    torch.testing.assert_close(ours, [each.grad for each in net.parameters()])
