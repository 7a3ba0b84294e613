"""Optimal-transport pairs: exact, within a class, and of straighter paths."""

from itertools import permutations

import pytest
import torch
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY, checkpoint_of
from torch import nn

from diffusion_lab.assembly import rules
from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.coupling import OptimalTransport
from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.noise import noise_of
from diffusion_lab.diffusion.objective import Flow, Objective, UniformTime
from diffusion_lab.diffusion.objective.loss import Denoising
from diffusion_lab.diffusion.sampler import Euler
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Rectified


def cost(x0, eps, order):
    return (x0 - eps[torch.as_tensor(order)]).square().sum().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1, 2, 2), (3,)])
def test_no_allowed_pairing_has_a_smaller_distance(seed, shape):
    x0, eps = torch.randn(2, 6, *shape, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([2, 0, 2, 2, 0, 1])
    every = [*permutations(range(6))]
    within = [each for each in every if (labels[list(each)] == labels).all()]
    anywhere = OptimalTransport(per_class=False)(x0, eps, labels)
    apart = OptimalTransport()(x0, eps, labels)
    for order, allowed in ((anywhere, every), (apart, within)):
        best = min(cost(x0, eps, each) for each in allowed)
        assert cost(x0, eps, order) == pytest.approx(best, rel=1e-5)
        assert tuple(order.tolist()) in allowed
    assert torch.equal(OptimalTransport()(x0, eps, None), anywhere)


def test_the_pairs_do_not_depend_on_autocast():
    x0, eps = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = OptimalTransport(False)(x0, eps, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OptimalTransport(False)(x0, eps, None), expected)


class Recorder(nn.Module):
    """A network that records the noisy points and labels that it is asked for."""

    self_conditioning, clip = False, None

    def __init__(self):
        super().__init__()
        self.conditioning = ClassLabel(Classes.numbered(2), 4)

    def forward(self, x, level, given=NOTHING):
        self.asked = x, level, given.labels
        return Estimate(x, None, x)


def noise_by_label(coupling):
    """The mean noise that points of two labels, at -1 and 1, are mixed with."""
    objective = Objective(Rectified(), Flow(), UniformTime(), Denoising(), coupling=coupling)
    labels = torch.arange(1000) % 2
    x0 = (2.0 * labels - 1)[:, None, None, None]
    network = Recorder()
    objective(network, x0, Given(labels), torch.Generator().manual_seed(0))
    x, level, seen = network.asked
    assert torch.equal(seen, labels)  # images and labels stay in their places
    eps = noise_of(x, x0, level).flatten()
    assert eps.mean().abs() < 0.1
    assert eps.std().item() == pytest.approx(1, abs=0.1)
    return [eps[labels == label].mean().item() for label in (0, 1)]


def test_pairs_across_labels_give_each_label_noise_of_its_own_and_pairs_within_do_not():
    assert noise_by_label(None) == pytest.approx([0, 0], abs=0.1)
    assert noise_by_label(OptimalTransport(per_class=True)) == pytest.approx([0, 0], abs=0.1)
    # half of a normal distribution has its mean at sqrt(2 / pi)
    assert noise_by_label(OptimalTransport(per_class=False)) == pytest.approx([-0.8, 0.8], abs=0.1)


def test_each_label_has_its_own_pairs_also_if_the_network_does_not_see_it():
    """Labels are dropped, at a rate of 1 here, after noise and images are paired."""
    labels = torch.arange(1000) % 2
    x0 = (2.0 * labels - 1)[:, None, None, None] + torch.zeros(1000, 1, 2, 2)
    seen = []

    def coupling(x0, eps, labels):
        seen.append(labels)
        return torch.arange(len(x0))

    objective = Objective(
        Rectified(), Flow(), UniformTime(), Denoising(), label_dropout=1.0, coupling=coupling
    )
    objective(Recorder(), x0, Given(labels))
    assert torch.equal(seen[0], labels)


class Plane(nn.Module):
    """A small network in the plane, which predicts the velocity."""

    self_conditioning, clip = False, None

    def __init__(self):
        super().__init__()
        self.conditioning = Unconditional(Classes.numbered(0), 0)
        self.layers = nn.Sequential(
            *(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        )

    def forward(self, x, level, given=NOTHING):
        t = level.t.float().expand(len(x))[:, None]
        output = self.layers(torch.cat([x, t], 1))
        return Estimate(Flow().to_x0(output, x, level), None, output)


def trained(coupling) -> Plane:
    """A network of eight points on a circle, after some hundred steps."""
    torch.manual_seed(0)
    angles = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    network = Plane()
    objective = Objective(Rectified(), Flow(), UniformTime(), Denoising(), coupling=coupling)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(400):
        x0 = centres[torch.randint(8, (128,))] + 0.15 * torch.randn(128, 2)
        optimizer.zero_grad()
        objective(network, x0).minimised.mean().backward()
        optimizer.step()
    return network


@pytest.mark.slow
def test_paths_are_straighter_and_need_fewer_steps():
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    bends, errors = {}, {}
    for name, coupling in (("independent", None), ("coupled", OptimalTransport(False))):
        network = trained(coupling)
        with torch.no_grad():
            levels = UniformGrid()(Rectified(), 64)
            walk = Euler(64, UniformGrid()).walk(network, noise, levels, Rectified(), None)
            states = torch.stack([noise, *walk])
            end, steps = states[-1], states.diff(dim=0)
            away = steps * 64 - (end - noise)  # velocities from the mean velocity of the path
            bends[name] = away.square().sum(-1).mean().item()
            for count in (2, 8):
                few = Euler(count, UniformGrid())(network, noise, Rectified())
                errors[name, count] = (few - end).square().sum(1).mean().sqrt().item()
    assert bends["coupled"] < bends["independent"] / 10
    assert errors["coupled", 2] < errors["independent", 2] / 3
    assert errors["coupled", 2] < 2 * errors["independent", 8]  # a quarter of the steps


def gap(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.slow
def test_pairs_are_within_a_micro_batch_of_one_rank(lab, tmp_path):
    """Two ranks of four images pair as two micro-batches of four, whose draws are the same."""
    coupled = [*TINY, "coupling=optimal_transport", "callbacks.evaluation=null", "logger=none"]
    across = "coupling.per_class=false"
    ways = {
        "ranks": ["trainer.devices=2", across],
        "parts": ["micro_batch_size=4", across],
        "free": ["micro_batch_size=4", "coupling=none"],
    }
    for folder, way in ways.items():
        exact = ["trainer.precision=32-true", "optimizer.lr=1e-2", f"run_dir={folder}"]
        lab.done("train", *coupled, *exact, *way)
    ranks, parts, free = (checkpoint_of(tmp_path / folder)["state_dict"] for folder in ways)
    assert gap(ranks, parts) < 1e-7
    assert gap(ranks, free) > 1e-6  # averaged weights, of four steps


def test_pairs_across_labels_are_advised_against_where_labels_are_seen():
    across = OptimalTransport(per_class=False)
    (said,) = rules.warned(coupling=across, conditional=True)
    assert_names(said, "coupling.per_class=false")
    for coupling, conditional in ((across, False), (OptimalTransport(), True), (None, True)):
        assert list(rules.warned(coupling=coupling, conditional=conditional)) == []
