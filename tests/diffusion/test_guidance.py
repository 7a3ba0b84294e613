"""Guidance: the identities of its scale, and its number of network calls."""

import pytest
import torch
from helpers.refusals import refused
from torch import nn

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.guidance import (
    Guidance,
    ProjectedGuidance,
    ZeroStarGuidance,
    keep_known,
)
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.sampler import Ancestral, DPMSolver, Euler
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Cosine, Rectified

LEVEL = Cosine()(torch.tensor(0.5))


class Recorder(nn.Module):
    """A network of x0 = 0.5 x + label (3 is the null label) that records its calls."""

    def __init__(self, conditioning, slope=0.5, self_conditioning=False):
        super().__init__()
        self.conditioning = conditioning
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
    return Recorder(ClassLabel(labels=Classes.numbered(3), width=4))


X = torch.linspace(-0.3, 0.7, 8).reshape(4, 2)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("scale", [-0.5, 0.5, 2.0, 7.5])
def test_other_scales_extrapolate_in_one_call_of_twice_the_batch(model, scale):
    x0 = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    weak, strong = 0.5 * X + 3, 0.5 * X + LABELS[:, None]
    torch.testing.assert_close(x0, weak + scale * (strong - weak))
    assert model.calls == [LABELS.tolist() + [3] * 4]


def test_without_labels_the_model_is_unconditional(model):
    assert torch.equal(Guidance().bind(model, None)(X, LEVEL).x0, 0.5 * X + 3)
    assert model.calls == [None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_clip_clamps_the_guided_estimate(model, scale):
    free = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    clipped = Guidance(scale, clip=1.2).bind(model, LABELS)(X, LEVEL).x0
    assert torch.equal(clipped, free.clamp(-1.2, 1.2))
    assert not torch.equal(clipped, free)


def test_an_unconditional_model_cannot_be_guided(model):
    bare = Recorder(Unconditional(Classes.numbered(0), 4))
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
        strong = EVERY[kind](1.0).bind(model, LABELS)(X, level).x0
        assert torch.equal(strong, 0.5 * X + LABELS[:, None])
        weak = EVERY[kind](0.0).bind(model, LABELS)(X, level).x0
        assert torch.equal(weak, 0.5 * X + 3)
        assert model.calls[-2:] == [LABELS.tolist(), None]  # one each


@pytest.mark.parametrize("kind", EVERY)
def test_autoguidance_extrapolates_from_the_weak_model(model, kind):
    weak = Recorder(ClassLabel(labels=Classes.numbered(3), width=4), slope=0.2)
    assert torch.equal(
        EVERY[kind](1.0).bind(model, LABELS, weak)(X, LEVEL).x0, 0.5 * X + LABELS[:, None]
    )
    assert torch.equal(
        EVERY[kind](0.0).bind(model, LABELS, weak)(X, LEVEL).x0, 0.2 * X + LABELS[:, None]
    )
    guided = Guidance(2.0).bind(model, LABELS, weak)(X, LEVEL)
    torch.testing.assert_close(guided.x0, 0.8 * X + LABELS[:, None])
    assert torch.equal(guided.log_variance_weight, 0.1 * X)
    assert model.calls[-1] == weak.calls[-1] == LABELS.tolist()  # one call each, same labels
    bare = (
        Recorder(Unconditional(Classes.numbered(0), 4)),
        Recorder(Unconditional(Classes.numbered(0), 4), slope=0.2),
    )
    guided = Guidance(2.0).bind(bare[0], None, bare[1])(X, LEVEL).x0
    torch.testing.assert_close(guided, 0.8 * X + 3)  # autoguidance needs no labels


def test_a_weak_run_must_be_handed_over(model):
    with refused("weak_run", by=ValueError):
        Guidance(2.0, weak_run="outputs/x").bind(model, LABELS)


def test_outside_its_interval_it_costs_one_call_of_the_model_itself(model):
    guidance = Guidance(3.0, interval=(0.5, 2.0))
    levels = Rectified()(torch.tensor([0.2, 0.5, 0.8]))  # sigma / alpha = 1/4, 1 and 4
    denoise = guidance.bind(model, LABELS)
    full = Guidance(3.0).bind(model, LABELS)(X, LEVEL).x0
    plain = 0.5 * X + LABELS[:, None]
    for level, expected, size in zip(levels, (plain, full, plain), (4, 8, 4), strict=True):
        torch.testing.assert_close(denoise(X, level).x0, expected)
        assert len(model.calls[-1]) == size


def test_samples_at_levels_of_their_own_are_guided_each_by_its_own(model):
    levels = Rectified()(torch.tensor([0.2, 0.5, 0.8, 0.45]))
    x0 = Guidance(3.0, interval=(0.5, 2.0)).bind(model, LABELS)(X, levels).x0
    plain, full = 0.5 * X + LABELS[:, None], Guidance(3.0).bind(model, LABELS)(X, LEVEL).x0
    inside = torch.tensor([False, True, False, True])[:, None]
    torch.testing.assert_close(x0, torch.where(inside, full, plain))


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_moves_the_std_to_the_models_own(model, rescale):
    x = X**2 + 0.1 * X
    x0 = Guidance(5.0, rescale=rescale).bind(Wavy(), LABELS)(x, LEVEL).x0
    strong, full = (
        torch.sin(3 * x) + LABELS[:, None],
        Guidance(5.0).bind(Wavy(), LABELS)(x, LEVEL).x0,
    )
    ratio = strong.std(1, keepdim=True) / full.std(1, keepdim=True)
    torch.testing.assert_close(x0, (1 - rescale) * full + rescale * ratio * full)
    if rescale == 1:
        torch.testing.assert_close(x0.std(1), strong.std(1))


class Wavy(Recorder):
    """A network whose unconditional estimate has another shape than the conditional one."""

    def __init__(self):
        super().__init__(ClassLabel(labels=Classes.numbered(3), width=4))

    def forward(self, x, level, given=NOTHING):
        labels = given.labels
        null = (labels == 3)[:, None]
        return Estimate(torch.where(null, torch.cos(x), torch.sin(3 * x) + labels[:, None]))


def test_projected_guidance_is_the_papers():
    strong, weak = torch.sin(3 * X) + LABELS[:, None], torch.cos(X)
    denoise = ProjectedGuidance(4.0, parallel=0.2, norm_limit=0.5, momentum=-0.5).bind(
        Wavy(), LABELS
    )
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
    model = Recorder(ClassLabel(labels=Classes.numbered(3), width=4), self_conditioning=True)
    guidance = Guidance(scale)
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

    def denoise(x, level):  # denoiser of unit Gaussian data
        seen.append((level, x))
        level = level.like(x)
        return Estimate(level.alpha / (level.alpha**2 + level.sigma**2) * x)

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
