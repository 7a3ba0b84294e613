"""CFG-Zero*, CFG++, dynamic thresholding and classifier guidance against their formulas."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from helpers.exact_denoiser import GaussianMixture
from helpers.refusals import refused

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.guidance import (
    ClassifierGuidance,
    Guidance,
    PlusPlusGuidance,
    ZeroStarGuidance,
    keep_known,
)
from diffusion_lab.diffusion.noise import noise_of
from diffusion_lab.diffusion.sampler import Ancestral, DPMSolver, Euler, Heun, ReverseSDE
from diffusion_lab.diffusion.sampler.time_grid import Karras, UniformGrid
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

SCHEDULES = [Rectified(), Cosine(), DDPMLinear(), VarianceExploding()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
MEANS, STD = [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.3
ALL = GaussianMixture([0.5, 0.3, 0.2], MEANS, STD)
FIRST = GaussianMixture([1.0], MEANS[:1], STD)
NOISE = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(64, dtype=torch.int64)
NULL = 3


class Exact:
    """The exact model of a mixture, and of its first mode where the label is not null."""

    self_conditioning, clip = False, None

    def __init__(self):
        self.conditioning = ClassLabel(Classes.numbered(NULL), 4)
        self.calls = 0

    def __call__(self, x, level, given=NOTHING):
        self.calls += 1
        weak = ALL.denoise(x, level).x0
        if given.labels is None:
            return Estimate(weak)
        strong = FIRST.denoise(x, level).x0
        return Estimate(torch.where((given.labels == NULL)[:, None], weak, strong))


def estimates(x, level):
    return FIRST.denoise(x, level).x0, ALL.denoise(x, level).x0


@every_schedule
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_zero_star_scales_the_weak_velocity_to_fit_the_strong_one(scale, schedule):
    """Compares with equations 8 and 9 of arXiv:2503.18886, for velocities eps - x0."""
    denoise = ZeroStarGuidance(scale, zero_above=None).bind(Exact(), LABELS)
    for t in (1.0, 0.6, 0.05):
        level = schedule(torch.tensor(t, dtype=torch.float64))
        strong, weak = (noise_of(NOISE, x0, level) - x0 for x0 in estimates(NOISE, level))
        fit = (strong * weak).sum(1, keepdim=True) / weak.square().sum(1, keepdim=True)
        expected = (1 - scale) * fit * weak + scale * strong
        x0 = denoise(NOISE, level).x0
        torch.testing.assert_close(noise_of(NOISE, x0, level) - x0, expected, atol=1e-9, rtol=1e-9)


def test_zero_star_is_that_of_diffusers():
    """Compares with ClassifierFreeZeroStarGuidance on the velocities of a rectified flow."""
    guiders = pytest.importorskip("diffusers.guiders", reason="diffusers has them from 0.35 on")
    guider = guiders.ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=1)
    guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(700))
    level = Rectified()(torch.tensor(0.7, dtype=torch.float64))
    strong, weak = ((NOISE - x0) / level.t for x0 in estimates(NOISE, level))
    expected = NOISE - level.t * guider.forward(strong, weak).pred
    x0 = ZeroStarGuidance(3.0).bind(Exact(), LABELS)(NOISE, level).x0
    # theirs computes the factor in float32
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_zero_star_rests_where_the_noise_is_large(scale, schedule):
    """On the straight path x / (alpha + sigma), the point of a velocity of 0 stays where it is."""
    model, grid = Exact(), UniformGrid()
    levels = grid(schedule, 10)
    limit = (levels.sigma / levels.alpha)[3].item()  # three levels are noisier
    denoise = ZeroStarGuidance(scale, zero_above=limit).bind(model, LABELS)
    x = levels[0].sigma * NOISE
    start = x / (levels[0].alpha + levels[0].sigma)
    states = list(Euler(10, grid).walk(denoise, x, levels, schedule, None))
    for state, level in zip(states[:3], levels[1:4], strict=True):
        torch.testing.assert_close(state / (level.alpha + level.sigma), start)
    assert (states[3] / (levels[4].alpha + levels[4].sigma) - start).abs().max() > 1e-3
    assert model.calls == 7  # none at rest


def test_zero_star_leaves_out_the_first_step_from_pure_noise_and_no_other():
    for schedule, rested in ((Rectified(), 1), (Cosine(), 0), (VarianceExploding(), 0)):
        model = Exact()
        guidance = ZeroStarGuidance(2.0, clip=1.0)
        Euler(10, UniformGrid())(guidance.bind(model, LABELS), NOISE, schedule)
        assert model.calls == 10 - rested
    level = Rectified()(torch.ones((), dtype=torch.float64))
    # the limit of images does not hold for a point at rest, which is noise
    assert torch.equal(guidance.bind(model, LABELS)(NOISE, level).x0, NOISE)
    levels = Rectified()(torch.tensor([1.0, 0.5], dtype=torch.float64))
    x0 = ZeroStarGuidance(1.0).bind(Gaussian(), None)(NOISE[:2], levels).x0
    assert torch.equal(x0[0], NOISE[0])
    assert torch.equal(x0[1], Gaussian()(NOISE[:2], levels).x0[1])


@every_schedule
@pytest.mark.parametrize("error", [-1e-9, 0.0, 1e-9])
def test_zero_star_does_not_rest_at_its_limit_however_that_is_rounded(schedule, error):
    level = schedule(torch.tensor(0.96, dtype=torch.float64))
    limit = (level.sigma / level.alpha).item() * (1 + error)
    for above, calls in ((limit, 1), (0.99 * limit, 0)):
        model = Exact()
        ZeroStarGuidance(2.0, zero_above=above).bind(model, LABELS)(NOISE, level)
        assert model.calls == calls


def test_zero_star_takes_the_small_variance_at_rest():
    schedule, grid = DDPMLinear(), UniformGrid()
    levels = grid(schedule, 10)
    limit = (levels.sigma / levels.alpha)[3].item()  # three levels are noisier
    states = {}
    for variance in ("fixed_small", "learned"):
        denoise = ZeroStarGuidance(1.0, zero_above=limit).bind(Gaussian(), None)
        walk = Ancestral(10, grid, variance=variance).walk
        states[variance] = list(walk(denoise, NOISE, levels[:4], schedule, torch.ones_like))
    for one, other in zip(*states.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0.3, 0.6, 1.0])
def test_plus_plus_is_the_papers_ddim(scale):
    """Compares with algorithm 2 of arXiv:2406.08070, in alpha-bar, on DDPM's table."""
    schedule, steps = DDPMLinear(), 20
    levels = UniformGrid()(schedule, steps)
    alpha_bar, x = levels.alpha**2, levels[0].sigma * NOISE
    for level, now, then in zip(levels[:-1], alpha_bar, alpha_bar[1:], strict=False):
        eps, free = (noise_of(x, x0, level) for x0 in estimates(x, level))
        guided = free + scale * (eps - free)
        x0 = (x - (1 - now).sqrt() * guided) / now.sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * free
    ours = Euler(steps, UniformGrid())(
        PlusPlusGuidance(scale).bind(Exact(), LABELS), NOISE, schedule
    )
    torch.testing.assert_close(ours, x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_plus_plus_is_the_authors_euler_ancestral(eta):
    """Compares with their euler_cfg++ and euler_a_cfg++, where alpha is 1."""
    schedule, steps, scale = VarianceExploding(0.02, 50.0), 12, 0.7
    levels = Karras(0.02, 50.0)(schedule, steps)
    sigmas = levels.sigma
    draws = torch.randn(steps, 64, 2, dtype=torch.float64)
    x, fresh = sigmas[0] * NOISE, iter(draws)
    for level, (sigma, after) in zip(levels[:-1], pairwise(sigmas), strict=True):
        strong, weak = estimates(x, level)
        up = eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        down = (after**2 - up**2).sqrt()
        x = weak + scale * (strong - weak) + down * (x - weak) / sigma
        if after > 0:
            x = x + up * next(fresh)
    fresh = iter(draws)
    sampler = Ancestral(steps, Karras(0.02, 50.0), eta)
    denoise = PlusPlusGuidance(scale).bind(Exact(), LABELS)
    ours = sampler(denoise, NOISE, schedule, lambda x: next(fresh))
    torch.testing.assert_close(ours, x, atol=1e-9, rtol=0)


@every_schedule
def test_plus_plus_is_a_larger_scale_in_smaller_steps(schedule):
    """A step equals one of usual guidance with scale / (1 - noise left / noise before)."""
    denoise = PlusPlusGuidance(0.6).bind(Exact(), LABELS)
    levels = schedule(torch.tensor([1.0, 0.7, 0.6, 0.59, 0.2], dtype=torch.float64))
    for i in range(4):
        step, here, there = levels[i : i + 2], levels[i], levels[i + 1]
        (x,) = Euler(1, UniformGrid()).walk(denoise, NOISE, step, schedule, None)
        left = there.sigma / there.alpha * here.alpha / here.sigma
        usual = Guidance((0.6 / (1 - left)).item()).bind(Exact(), LABELS)
        (y,) = Euler(1, UniformGrid()).walk(usual, NOISE, step, schedule, None)
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


def test_plus_plus_at_0_is_the_weak_model_and_at_1_not_the_strong_one():
    model, level = Exact(), Rectified()(torch.tensor(0.5, dtype=torch.float64))
    strong, weak = estimates(NOISE, level)
    estimate = PlusPlusGuidance(0.0).bind(model, LABELS)(NOISE, level)
    assert torch.equal(estimate.x0, weak)
    assert model.calls == 1
    estimate = PlusPlusGuidance(1.0).bind(model, LABELS)(NOISE, level)
    torch.testing.assert_close(estimate.x0, strong)
    assert torch.equal(estimate.noise_x0, weak)


def test_plus_plus_outside_of_its_interval_is_the_model_itself():
    guidance = PlusPlusGuidance(0.5, interval=(0.5, 2.0))
    levels = Rectified()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    for i, inside in enumerate([False, True, False]):
        estimate = guidance.bind(Exact(), LABELS)(NOISE, levels[i])
        strong, weak = estimates(NOISE, levels[i])
        expected = (strong + weak) / 2 if inside else strong
        torch.testing.assert_close(estimate.x0, expected)
        assert (estimate.noise_x0 is not None) == inside


def test_only_samplers_of_one_jump_keep_the_noise_of_another_estimate():
    grid = UniformGrid()
    kept = [Euler(9, grid), Ancestral(9, grid), ReverseSDE(9, grid)]
    assert all(sampler.one_jump for sampler in kept)
    assert not any(sampler.one_jump for sampler in (Heun(9, grid), DPMSolver(9, grid)))


def test_a_known_part_keeps_its_own_noise_under_plus_plus():
    known, mask = torch.full((), 0.3, dtype=torch.float64), torch.tensor([True, False])
    denoise = keep_known(PlusPlusGuidance(0.6).bind(Exact(), LABELS), known, mask)
    x = Euler(30, UniformGrid())(denoise, NOISE, Cosine())
    torch.testing.assert_close(x[:, 0], torch.full_like(x[:, 0], 0.3))
    (state, *_) = Euler(30, UniformGrid()).walk(
        denoise, NOISE, UniformGrid()(Cosine(), 30), Cosine(), None
    )
    level = UniformGrid()(Cosine(), 30)[1]
    torch.testing.assert_close(noise_of(state[:, 0], known, level), NOISE[:, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995])
def test_dynamic_thresholding_is_that_of_diffusers(share):
    """Compares with DDIMScheduler's thresholding, whose largest limit is out of reach."""
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=share, sample_max_value=1e9
    )
    x = torch.randn(6, 3, 8, 8) * torch.tensor([0.1, 0.3, 1.0, 2.0, 5.0, 0.0])[:, None, None, None]
    expected = scheduler._threshold_sample(x)
    guidance = Guidance(clip=1.0, percentile=share)
    torch.testing.assert_close(guidance.clamped(x), expected)
    assert guidance.clamped(x).abs().max() <= 1
    half = Guidance(clip=0.5, percentile=share).clamped(x / 2)
    torch.testing.assert_close(half, expected / 2)


def test_dynamic_thresholding_leaves_samples_within_the_limit_alone():
    x = torch.linspace(-0.9, 0.9, 20).reshape(2, 10)
    assert torch.equal(Guidance(clip=1.0, percentile=0.9).clamped(x), x)
    with refused("percentile", by=ValueError):
        Guidance(percentile=0.9)


# ----------------------------------------------------------------------------------------------
# classifier guidance

TILT = torch.tensor([0.8, -2.0], dtype=torch.float64)


class Gaussian:
    """The exact, differentiable model of N(0.3, STD^2), without labels."""

    self_conditioning, clip = False, None

    def __init__(self):
        self.conditioning = Unconditional(Classes.numbered(2), 4)
        self.seen = []

    def __call__(self, x, level, given=NOTHING):
        self.seen.append(level.t)
        level = level.like(x)
        gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
        return Estimate(0.3 + gain * (x - 0.3 * level.alpha), 0 * x)


def tilted(x0, labels):
    """log p(label | x0), linear in x0: the posterior is then again a Gaussian."""
    return (2 * labels - 1) * (x0 @ TILT)


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_classifier_guidance_is_bayes_rule_where_the_estimate_says_all(scale, schedule):
    """N(m, s^2) times exp(a x0) is N(m + s^2 a, s^2): so is the guided estimate, at every level."""
    labels = torch.arange(64) % 2
    denoise = ClassifierGuidance(scale).bind(Gaussian(), labels, classifier=tilted)
    mean = 0.3 + scale * STD**2 * (2 * labels[:, None] - 1) * TILT
    for t in (0.95, 0.5, 0.02):
        level = schedule(torch.tensor(t, dtype=torch.float64))
        gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
        estimate = denoise(NOISE, level)
        torch.testing.assert_close(estimate.x0, mean + gain * (NOISE - mean * level.alpha))
        assert not estimate.x0.requires_grad
        assert not estimate.log_variance_weight.requires_grad


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_classifier_guidance_draws_from_the_class(inference):
    """A mixture's model without labels is guided by the exact classifier of its clean points."""
    means = torch.tensor(MEANS, dtype=torch.float64)

    class Mixture(Gaussian):
        def __call__(self, x, level, given=NOTHING):
            level = level.like(x)
            variance = level.alpha**2 * STD**2 + level.sigma**2
            away = x[:, None] - level.alpha * means
            shares = (-away.square().sum(-1) / (2 * variance)).softmax(-1)
            modes = means + level.alpha * STD**2 / variance * away
            return Estimate((shares[..., None] * modes).sum(1))

    def classify(x0, labels):
        logits = -(x0[:, None] - means).square().sum(-1) / (2 * STD**2)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    with inference():
        labels = torch.arange(600) % 3
        noise = torch.randn(600, 2, dtype=torch.float64)
        denoise = ClassifierGuidance(1.0).bind(Mixture(), labels, classifier=classify)
        x = Heun(40, UniformGrid())(denoise, noise, Rectified())
    nearest = torch.cdist(x, means).argmin(1)
    assert (nearest == labels).double().mean() > 0.95


def test_pure_noise_and_levels_outside_of_the_interval_are_not_guided():
    labels = LABELS[:3]
    levels = Rectified()(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    guidance = ClassifierGuidance(1.0, interval=(0.5, float("inf")))
    x0 = guidance.bind(Gaussian(), labels, classifier=tilted)(NOISE[:3], levels).x0
    plain = Gaussian()(NOISE[:3], levels).x0
    assert torch.equal(x0[[0, 2]], plain[[0, 2]])
    assert (x0[1] != plain[1]).all()
    for level in (levels[0], levels[2]):
        x0 = guidance.bind(Gaussian(), labels, classifier=tilted)(NOISE[:3], level).x0
        assert torch.equal(x0, Gaussian()(NOISE[:3], level).x0)


def test_scale_0_needs_no_classifier_and_others_a_classifier_and_labels():
    level = Rectified()(torch.tensor(0.5, dtype=torch.float64))
    x0 = ClassifierGuidance(0.0).bind(Gaussian(), None)(NOISE, level).x0
    assert torch.equal(x0, Gaussian()(NOISE, level).x0)
    for labels, classifier in ((LABELS, None), (None, tilted)):
        with refused("classifier", by=ValueError):
            ClassifierGuidance(1.0).bind(Gaussian(), labels, classifier=classifier)
    with refused("weak_run", by=ValueError):
        ClassifierGuidance(1.0, weak_run="outputs/x")
