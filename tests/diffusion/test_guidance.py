"""Guidance: the identities of its scale, and its number of network calls."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from helpers.exact_denoiser import GaussianMixture
from helpers.refusals import refused
from helpers.walks import every_schedule, replayed
from torch import nn

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.guidance import (
    ClassifierGuidance,
    Guidance,
    PlusPlusGuidance,
    ProjectedGuidance,
    ZeroStarGuidance,
    keep_known,
)
from diffusion_lab.diffusion.noise import NoiseLevel, noise_of
from diffusion_lab.diffusion.sampler import Ancestral, DPMSolver, Euler, Heun, ReverseSDE
from diffusion_lab.diffusion.sampler.time_grid import Karras, UniformGrid
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

LEVEL = Cosine()(torch.tensor(0.5))


class Recorder(nn.Module):
    """A network of x0 = 0.5 x + label (3 is the null label) that records its calls."""

    def __init__(self, slope=0.5, conditioning=None, self_conditioning=False):
        super().__init__()
        self.conditioning = conditioning or ClassLabel(labels=Classes.numbered(3), width=4)
        self.slope = slope
        self.self_conditioning = self_conditioning
        self.calls = []
        self.previous = []

    def forward(self, x, level, given=NOTHING):
        labels, previous = given.labels, given.previous
        self.calls.append(None if labels is None else labels.tolist())
        self.previous.append(previous)
        labels = torch.full((len(x),), 3) if labels is None else labels
        return Estimate(self.slope * x + labels[:, None], log_variance_weight=0.1 * x)


@pytest.fixture
def model():
    return Recorder()


X = torch.linspace(-0.3, 0.7, 8).reshape(4, 2)
LABELS = torch.tensor([0, 1, 2, 1])
STRONG, WEAK = 0.5 * X + LABELS[:, None], 0.5 * X + 3


@pytest.mark.parametrize("scale", [-0.5, 0.5, 2.0, 7.5])
def test_other_scales_extrapolate_in_one_call_of_twice_the_batch(model, scale):
    x0 = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    torch.testing.assert_close(x0, WEAK + scale * (STRONG - WEAK))
    assert model.calls == [LABELS.tolist() + [3] * 4]


def test_without_labels_the_model_is_unconditional(model):
    assert torch.equal(Guidance().bind(model, None)(X, LEVEL).x0, WEAK)
    assert model.calls == [None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_clip_clamps_the_guided_estimate(model, scale):
    free = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    clipped = Guidance(scale, clip=1.2).bind(model, LABELS)(X, LEVEL).x0
    assert torch.equal(clipped, free.clamp(-1.2, 1.2))
    assert not torch.equal(clipped, free)


def test_an_unconditional_model_cannot_be_guided(model):
    bare = Recorder(conditioning=Unconditional(Classes.numbered(0), 4))
    for scale in (0.0, 1.0):
        Guidance(scale).bind(bare, None)(X, LEVEL)
    for denoiser, labels in ((bare, None), (bare, LABELS), (model, None)):
        with refused("scale=2.0", by=ValueError):
            Guidance(2.0).bind(denoiser, labels)


EVERY = {  # every kind of guidance, at a scale
    "plain": Guidance,
    "interval": lambda scale: Guidance(scale, interval=(0.9, 1.1)),
    "rescaled": lambda scale: Guidance(scale, rescale=0.7),
    "projected": lambda scale: ProjectedGuidance(scale, norm_limit=0.1, momentum=-0.5),
    "zero_star": lambda scale: ZeroStarGuidance(scale, zero_above=None),
}


@pytest.mark.parametrize("kind", EVERY)
def test_scales_1_and_0_are_one_exact_call_for_every_kind(model, kind):
    pure = NoiseLevel(*torch.tensor([1.0, 0.0, 1.0]))
    for level in (LEVEL, Cosine()(torch.tensor(0.9)), pure):
        assert torch.equal(EVERY[kind](1.0).bind(model, LABELS)(X, level).x0, STRONG)
        assert torch.equal(EVERY[kind](0.0).bind(model, LABELS)(X, level).x0, WEAK)
        assert model.calls[-2:] == [LABELS.tolist(), None]  # one each


@pytest.mark.parametrize("kind", EVERY)
def test_scales_1_and_0_of_autoguidance_are_the_model_and_the_weak_one(model, kind):
    for scale, slope in ((1.0, 0.5), (0.0, 0.2)):
        x0 = EVERY[kind](scale).bind(model, LABELS, Recorder(slope=0.2))(X, LEVEL).x0
        assert torch.equal(x0, slope * X + LABELS[:, None])


def test_autoguidance_extrapolates_from_the_weak_model(model):
    weak = Recorder(slope=0.2)
    guided = Guidance(2.0).bind(model, LABELS, weak)(X, LEVEL)
    torch.testing.assert_close(guided.x0, 0.8 * X + LABELS[:, None])
    assert torch.equal(guided.log_variance_weight, 0.1 * X)
    assert model.calls == weak.calls == [LABELS.tolist()]  # one call each, same labels
    bare, weak = (Recorder(slope, Unconditional(Classes.numbered(0), 4)) for slope in (0.5, 0.2))
    guided = Guidance(2.0).bind(bare, None, weak)(X, LEVEL).x0
    torch.testing.assert_close(guided, 0.8 * X + 3)  # autoguidance needs no labels


def test_a_weak_run_must_be_handed_over(model):
    with refused("weak_run", by=ValueError):
        Guidance(2.0, weak_run="outputs/x").bind(model, LABELS)


def test_outside_its_interval_it_costs_one_call_of_the_model_itself(model):
    guidance = Guidance(3.0, interval=(0.5, 2.0))
    levels = Rectified()(torch.tensor([0.2, 0.5, 0.8]))  # sigma / alpha = 1/4, 1 and 4
    denoise = guidance.bind(model, LABELS)
    full = Guidance(3.0).bind(model, LABELS)(X, LEVEL).x0
    for level, expected, size in zip(levels, (STRONG, full, STRONG), (4, 8, 4), strict=True):
        torch.testing.assert_close(denoise(X, level).x0, expected)
        assert len(model.calls[-1]) == size


def test_samples_at_levels_of_their_own_are_guided_each_by_its_own(model):
    levels = Rectified()(torch.tensor([0.2, 0.5, 0.8, 0.45]))
    x0 = Guidance(3.0, interval=(0.5, 2.0)).bind(model, LABELS)(X, levels).x0
    full = Guidance(3.0).bind(model, LABELS)(X, LEVEL).x0
    inside = torch.tensor([False, True, False, True])[:, None]
    torch.testing.assert_close(x0, torch.where(inside, full, STRONG))


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_moves_the_std_to_the_models_own(rescale):
    x = X**2 + 0.1 * X
    x0 = Guidance(5.0, rescale=rescale).bind(Wavy(), LABELS)(x, LEVEL).x0
    strong = torch.sin(3 * x) + LABELS[:, None]
    full = Guidance(5.0).bind(Wavy(), LABELS)(x, LEVEL).x0
    ratio = strong.std(1, keepdim=True) / full.std(1, keepdim=True)
    torch.testing.assert_close(x0, (1 - rescale) * full + rescale * ratio * full)
    if rescale == 1:
        torch.testing.assert_close(x0.std(1), strong.std(1))


class Wavy(Recorder):
    """A network whose unconditional estimate has another shape than the conditional one."""

    def forward(self, x, level, given=NOTHING):
        labels = given.labels
        null = (labels == 3)[:, None]
        return Estimate(torch.where(null, torch.cos(x), torch.sin(3 * x) + labels[:, None]))


def test_projected_guidance_is_the_papers():
    strong, weak = torch.sin(3 * X) + LABELS[:, None], torch.cos(X)
    guidance = ProjectedGuidance(4.0, parallel=0.2, norm_limit=0.5, momentum=-0.5)
    denoise = guidance.bind(Wavy(), LABELS)
    average = torch.zeros_like(X)
    for _ in range(3):  # arXiv:2410.02416, algorithm 1, vector by vector
        average = (strong - weak) - 0.5 * average
        expected = []
        for direction, along in zip(average, strong, strict=True):
            direction = direction * min(1.0, 0.5 / direction.norm().item())
            parallel = (direction @ along) / (along @ along) * along
            expected.append(along + 3.0 * (direction - parallel + 0.2 * parallel))
        torch.testing.assert_close(denoise(X, LEVEL).x0, torch.stack(expected))


def test_momentum_of_a_sample_is_its_own_where_levels_differ():
    """Outside of the interval a sample moves nothing, whatever the rest of the batch does."""
    guidance = ProjectedGuidance(4.0, interval=(0.0, 2.0), norm_limit=0.5, momentum=-0.5)
    times = torch.tensor([[0.9, 0.5, 0.5, 0.9], [0.5, 0.9, 0.5, 0.9], [0.4, 0.4, 0.9, 0.4]])

    def walk(places):
        denoise = guidance.bind(Wavy(), LABELS[places])
        return [denoise(X[places], Cosine()(t[places])).x0 for t in times]

    together = walk([0, 1, 2, 3])
    for place in range(4):
        for own, all_of_them in zip(walk([place]), together, strict=True):
            torch.testing.assert_close(own[0], all_of_them[place])


def test_projected_guidance_without_projection_is_classifier_free(model):
    plain = Guidance(4.0).bind(model, LABELS)(X, LEVEL).x0
    projected = ProjectedGuidance(4.0, parallel=1.0).bind(model, LABELS)(X, LEVEL).x0
    torch.testing.assert_close(projected, plain)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_self_conditioning_hands_the_last_estimate_on(scale):
    model, guidance = Recorder(self_conditioning=True), Guidance(scale)
    denoise = guidance.bind(model, LABELS)
    first = denoise(X, LEVEL).x0
    denoise(X, LEVEL)
    assert model.previous[0] is None
    assert torch.equal(model.previous[1], first if scale == 1 else torch.cat([first, first]))
    guidance.bind(model, LABELS)(X, LEVEL)
    assert model.previous[2] is None  # another walk remembers nothing of this one


@pytest.mark.parametrize("sampler", [Euler, DPMSolver, Ancestral])
def test_inpainting_ends_on_what_is_known_and_keeps_the_rest_free(sampler):
    torch.manual_seed(0)
    known = torch.linspace(-1, 1, 6).expand(2000, 6)
    mask = torch.tensor([True, True, True, False, False, False])
    seen = []

    def denoise(x, level):
        seen.append((level, x))
        return GaussianMixture([1.0], [0.0], 1.0).denoise(x, level)

    noise = torch.randn(2000, 6)
    x = sampler(40, UniformGrid())(keep_known(denoise, known, mask), noise, Cosine())
    assert torch.equal(x[:, :3], known[:, :3])
    assert x[:, 3:].std().item() == pytest.approx(1, rel=0.1)
    level, state = seen[20]  # in between, the known part is as noisy as its level
    residual = state[:, :3] - level.alpha * known[:, :3]
    assert residual.std().item() == pytest.approx(level.sigma.item(), rel=0.1)


def test_inpainting_follows_what_is_known():
    """Two numbers have a correlation of 0.9 and one is known: the other must follow it."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def denoise(x, level):
        alpha, sigma = level.alpha.float(), level.sigma.float()
        total = alpha**2 * covariance + sigma**2 * torch.eye(2)
        return Estimate(x @ torch.linalg.solve(total, alpha * covariance))

    means = []
    for value in (-1.0, 1.0):
        constrained = keep_known(denoise, torch.full((), value), torch.tensor([True, False]))
        x = Ancestral(100, UniformGrid())(constrained, torch.randn(2000, 2), Cosine())
        means.append(x[:, 1].mean().item())
    assert means == pytest.approx([-0.9, 0.9], abs=0.3)  # replacement falls short of 0.9


@pytest.mark.parametrize("guidance", [Guidance(2.0, rescale=0.7), ProjectedGuidance(2.0)])
def test_an_estimate_of_zero_is_guided_to_a_finite_one(model, guidance):
    denoise = guidance.bind(model, torch.zeros(4, dtype=torch.int64))
    assert denoise(torch.zeros_like(X), LEVEL).x0.isfinite().all()


MEANS, STD = [[-1.0, 0.0], [0.5, 1.0], [1.0, -0.7]], 0.3
ALL = GaussianMixture([0.5, 0.3, 0.2], MEANS, STD)
FIRST = GaussianMixture([1.0], MEANS[:1], STD)
NOISE = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ONE_LABEL = torch.zeros(64, dtype=torch.int64)
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
    denoise = ZeroStarGuidance(scale, zero_above=None).bind(Exact(), ONE_LABEL)
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
    x0 = ZeroStarGuidance(3.0).bind(Exact(), ONE_LABEL)(NOISE, level).x0
    # theirs computes the factor in float32
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_zero_star_rests_where_the_noise_is_large(scale, schedule):
    """On the straight path x / (alpha + sigma), the point of a velocity of 0 stays where it is."""
    model, grid = Exact(), UniformGrid()
    levels = grid(schedule, 10)
    limit = (levels.sigma / levels.alpha)[3].item()  # three levels are noisier
    denoise = ZeroStarGuidance(scale, zero_above=limit).bind(model, ONE_LABEL)
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
        Euler(10, UniformGrid())(guidance.bind(model, ONE_LABEL), NOISE, schedule)
        assert model.calls == 10 - rested
    level = Rectified()(torch.ones((), dtype=torch.float64))
    # the limit of images does not hold for a point at rest, which is noise
    assert torch.equal(guidance.bind(model, ONE_LABEL)(NOISE, level).x0, NOISE)
    levels = Rectified()(torch.tensor([1.0, 0.5], dtype=torch.float64))
    x0 = ZeroStarGuidance(1.0).bind(Unlabelled(), None)(NOISE[:2], levels).x0
    assert torch.equal(x0[0], NOISE[0])
    assert torch.equal(x0[1], GAUSSIAN.denoise(NOISE[:2], levels).x0[1])


@every_schedule
@pytest.mark.parametrize("error", [-1e-9, 0.0, 1e-9])
def test_zero_star_does_not_rest_at_its_limit_however_that_is_rounded(schedule, error):
    level = schedule(torch.tensor(0.96, dtype=torch.float64))
    limit = (level.sigma / level.alpha).item() * (1 + error)
    for above, calls in ((limit, 1), (0.99 * limit, 0)):
        model = Exact()
        ZeroStarGuidance(2.0, zero_above=above).bind(model, ONE_LABEL)(NOISE, level)
        assert model.calls == calls


def test_zero_star_takes_the_small_variance_at_rest():
    schedule, grid = DDPMLinear(), UniformGrid()
    levels = grid(schedule, 10)
    limit = (levels.sigma / levels.alpha)[3].item()  # three levels are noisier
    states = {}
    for variance in ("fixed_small", "learned"):
        denoise = ZeroStarGuidance(1.0, zero_above=limit).bind(Unlabelled(), None)
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
        PlusPlusGuidance(scale).bind(Exact(), ONE_LABEL), NOISE, schedule
    )
    torch.testing.assert_close(ours, x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_plus_plus_is_the_authors_euler_ancestral(eta):
    """Compares with their euler_cfg++ and euler_a_cfg++, where alpha is 1."""
    schedule, steps, scale = VarianceExploding(0.02, 50.0), 12, 0.7
    levels = Karras(0.02, 50.0)(schedule, steps)
    sigmas = levels.sigma
    draws = torch.randn(steps, 64, 2, dtype=torch.float64)
    x, fresh = sigmas[0] * NOISE, replayed(draws)
    for level, (sigma, after) in zip(levels[:-1], pairwise(sigmas), strict=True):
        strong, weak = estimates(x, level)
        up = eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        down = (after**2 - up**2).sqrt()
        x = weak + scale * (strong - weak) + down * (x - weak) / sigma
        if after > 0:
            x = x + up * fresh()
    sampler = Ancestral(steps, Karras(0.02, 50.0), eta)
    denoise = PlusPlusGuidance(scale).bind(Exact(), ONE_LABEL)
    ours = sampler(denoise, NOISE, schedule, replayed(draws))
    torch.testing.assert_close(ours, x, atol=1e-9, rtol=0)


@every_schedule
def test_plus_plus_is_a_larger_scale_in_smaller_steps(schedule):
    """A step equals one of usual guidance with scale / (1 - noise left / noise before)."""
    denoise = PlusPlusGuidance(0.6).bind(Exact(), ONE_LABEL)
    levels = schedule(torch.tensor([1.0, 0.7, 0.6, 0.59, 0.2], dtype=torch.float64))
    for i in range(4):
        step, here, there = levels[i : i + 2], levels[i], levels[i + 1]
        (x,) = Euler(1, UniformGrid()).walk(denoise, NOISE, step, schedule, None)
        left = there.sigma / there.alpha * here.alpha / here.sigma
        usual = Guidance((0.6 / (1 - left)).item()).bind(Exact(), ONE_LABEL)
        (y,) = Euler(1, UniformGrid()).walk(usual, NOISE, step, schedule, None)
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


def test_plus_plus_at_0_is_the_weak_model_and_at_1_not_the_strong_one():
    model, level = Exact(), Rectified()(torch.tensor(0.5, dtype=torch.float64))
    strong, weak = estimates(NOISE, level)
    estimate = PlusPlusGuidance(0.0).bind(model, ONE_LABEL)(NOISE, level)
    assert torch.equal(estimate.x0, weak)
    assert model.calls == 1
    estimate = PlusPlusGuidance(1.0).bind(model, ONE_LABEL)(NOISE, level)
    torch.testing.assert_close(estimate.x0, strong)
    assert torch.equal(estimate.noise_x0, weak)


def test_plus_plus_outside_of_its_interval_is_the_model_itself():
    guidance = PlusPlusGuidance(0.5, interval=(0.5, 2.0))
    levels = Rectified()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    for i, inside in enumerate([False, True, False]):
        estimate = guidance.bind(Exact(), ONE_LABEL)(NOISE, levels[i])
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
    denoise = keep_known(PlusPlusGuidance(0.6).bind(Exact(), ONE_LABEL), known, mask)
    levels = UniformGrid()(Cosine(), 30)
    first, *_, x = Euler(30, UniformGrid()).walk(denoise, NOISE, levels, Cosine(), None)
    torch.testing.assert_close(x[:, 0], torch.full_like(x[:, 0], 0.3))
    kept = noise_of(first[:, 0], known, levels[1])
    torch.testing.assert_close(kept, NOISE[:, 0], atol=1e-3, rtol=0)


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


TILT = torch.tensor([0.8, -2.0], dtype=torch.float64)
GAUSSIAN = GaussianMixture([1.0], [0.3], STD)


class Unlabelled:
    """The exact, differentiable model of a mixture, without labels."""

    self_conditioning, clip = False, None
    conditioning = Unconditional(Classes.numbered(2), 4)

    def __init__(self, mixture=GAUSSIAN):
        self.mixture = mixture

    def __call__(self, x, level, given=NOTHING):
        return Estimate(self.mixture.denoise(x, level).x0, 0 * x)


def tilted(x0, labels):
    """log p(label | x0), linear in x0: the posterior is then again a Gaussian."""
    return (2 * labels - 1) * (x0 @ TILT)


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_classifier_guidance_is_bayes_rule_where_the_estimate_says_all(scale, schedule):
    """N(m, s^2) times exp(a x0) is N(m + s^2 a, s^2): so is the guided estimate, at every level."""
    labels = torch.arange(64) % 2
    denoise = ClassifierGuidance(scale).bind(Unlabelled(), labels, classifier=tilted)
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
    mixture = GaussianMixture([1 / 3] * 3, MEANS, STD)

    def classify(x0, labels):
        logits = -(x0[:, None] - mixture.means).square().sum(-1) / (2 * STD**2)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    with inference():
        labels = torch.arange(600) % 3
        noise = torch.randn(600, 2, dtype=torch.float64)
        denoise = ClassifierGuidance(1.0).bind(Unlabelled(mixture), labels, classifier=classify)
        x = Heun(40, UniformGrid())(denoise, noise, Rectified())
    nearest = torch.cdist(x, mixture.means).argmin(1)
    assert (nearest == labels).double().mean() > 0.95


def test_pure_noise_and_levels_outside_of_the_interval_are_not_guided():
    labels = ONE_LABEL[:3]
    levels = Rectified()(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    guidance = ClassifierGuidance(1.0, interval=(0.5, float("inf")))
    x0 = guidance.bind(Unlabelled(), labels, classifier=tilted)(NOISE[:3], levels).x0
    plain = GAUSSIAN.denoise(NOISE[:3], levels).x0
    assert torch.equal(x0[[0, 2]], plain[[0, 2]])
    assert (x0[1] != plain[1]).all()
    for level in (levels[0], levels[2]):
        x0 = guidance.bind(Unlabelled(), labels, classifier=tilted)(NOISE[:3], level).x0
        assert torch.equal(x0, GAUSSIAN.denoise(NOISE[:3], level).x0)


def test_scale_0_needs_no_classifier_and_others_a_classifier_and_labels():
    level = Rectified()(torch.tensor(0.5, dtype=torch.float64))
    x0 = ClassifierGuidance(0.0).bind(Unlabelled(), None)(NOISE, level).x0
    assert torch.equal(x0, GAUSSIAN.denoise(NOISE, level).x0)
    for labels, classifier in ((ONE_LABEL, None), (None, tilted)):
        with refused("classifier", by=ValueError):
            ClassifierGuidance(1.0).bind(Unlabelled(), labels, classifier=classifier)
    with refused("weak_run", by=ValueError):
        ClassifierGuidance(1.0, weak_run="outputs/x")
