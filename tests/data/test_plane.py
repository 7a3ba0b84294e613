"""Points in the plane: the moons, the mixture with its density and score, and their pictures."""

import runpy
import sys

import pytest
import torch
from helpers.data_modules import data_of
from helpers.paths import ROOT
from PIL import Image

from diffusion_lab.backbone import MLP
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.common.images import to_float
from diffusion_lab.data.source import GaussianMixture, TwoMoons


def moons(noise: float):
    """The data, their labels, and points (N, 2) and distances (N,) from the circles' centres."""
    data = data_of(TwoMoons, noise=noise)
    labels = data.train_labels()
    points = to_float(data.train_images()).flatten(1)
    points = points - torch.tensor([[-0.25, -0.125], [0.25, 0.125]])[labels]
    return data, labels, points, points.norm(dim=1)


def test_two_moons_are_two_half_circles():
    datamodule, labels, points, radius = moons(0.0)
    torch.testing.assert_close(radius, torch.full((20_000,), 0.5), atol=0.006, rtol=0)
    height = points[:, 1]
    assert (height[labels == 0] > -0.005).all()
    assert (height[labels == 1] < 0.005).all()
    assert labels.bincount().tolist() == [10_000, 10_000]
    assert not torch.equal(datamodule.test_images(), datamodule.train_images()[:2000])
    assert datamodule.fingerprint == data_of(TwoMoons, noise=0.0).fingerprint


def test_noise_is_the_std_across_the_circle():
    _, _, _, radius = moons(0.05)
    assert radius.std().item() == pytest.approx(0.05, rel=0.03)


def test_the_picture_puts_points_where_they_are():
    images = torch.tensor([[0, 0], [255, 255], [10, 200]], dtype=torch.uint8)[:, :, None, None]
    picture = TwoMoons().picture(images, columns=2)
    assert picture.shape == (3, 256, 256)
    assert (picture != 255).any(0).nonzero().tolist() == [[0, 255], [55, 10], [255, 0]]
    assert torch.equal(picture[:, 255, 0], picture[:, 0, 255])  # two points per colour
    assert not torch.equal(picture[:, 255, 0], picture[:, 55, 10])


def test_mlp_is_zero_at_first_and_learns_with_all_its_parameters():
    torch.manual_seed(0)
    mlp = MLP(2, 3, (4, 5), width=16, depth=2)
    x, noise = torch.randn(6, 2, 4, 5), torch.linspace(0, 1000, 6)
    condition = Condition(torch.randn(6, 16))
    assert torch.equal(mlp(x, noise, condition), torch.zeros(6, 3, 4, 5))
    optimiser = torch.optim.SGD(mlp.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (mlp(x, noise, condition) - torch.randn(6, 3, 4, 5)).square().sum().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.any() for p in mlp.parameters())
    first = mlp(x, noise, condition)
    assert not torch.equal(first, mlp(x, noise, Condition()))
    assert not torch.equal(first, mlp(x, noise + 1, condition))


QUICK = ["trainer=cpu", "trainer.max_steps=60", "logger=none"]


@pytest.fixture
def require_drawn(lab, tmp_path, monkeypatch):
    """A function: asserts that a script of experiments/ draws pictures of runs with these names."""

    def draw(script: str, runs: list[str], *names: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *runs, "--output", "figures"])
        runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")
        for name in names:
            with Image.open(tmp_path / "figures" / name) as picture:
                assert min(picture.size) > 400

    return draw


@pytest.mark.slow
def test_the_toy_trains_and_its_paths_are_drawn(lab, tmp_path, require_drawn):
    small = ["batch_size=256", "sampler.steps=4", "run_dir=run"]
    lab.done("train", "experiment=toy/two_moons", *QUICK, *small)
    with Image.open(tmp_path / "run/samples/step_0000060.png") as picture:
        assert picture.size == (512, 512)
    lab.done("sample", "run=run", "num_samples=20")
    require_drawn("theory/figures.py", ["run"], "schedules.png", "paths.png")


def test_points_lie_around_both_centres_in_their_shares():
    data = data_of(GaussianMixture, std=0.1, share=0.2)
    points, labels = to_float(data.train_images()).flatten(1), data.train_labels()
    assert (labels == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    for label, centre in enumerate((-0.5, 0.5)):
        own = points[labels == label]
        torch.testing.assert_close(own.mean(0), torch.full((2,), centre), atol=0.01, rtol=0)
        assert own.std().item() == pytest.approx(0.1, rel=0.03)
    assert data.fingerprint == data_of(GaussianMixture, std=0.1, share=0.2).fingerprint
    assert data.fingerprint != data_of(GaussianMixture, std=0.1, share=0.3).fingerprint


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_density_has_an_integral_of_one_and_the_score_is_its_gradient(sigma):
    source = GaussianMixture()
    line = torch.linspace(-4, 4, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    density = source.log_density(grid, sigma).exp()
    assert density.sum().item() * 0.01**2 == pytest.approx(1, abs=1e-3)
    # the score at the mean of a Gaussian that is alone there is almost 0, and linear around it
    points = torch.tensor([[0.5, 0.5], [0.6, 0.5], [0.1, -0.2]], dtype=torch.float64)
    score, step = source.score(points, sigma), 1e-6
    for axis in (0, 1):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[axis] = step
        ends = (source.log_density(points + sign * shift, sigma) for sign in (1, -1))
        slope = next(ends).sub(next(ends)) / (2 * step)
        torch.testing.assert_close(score[:, axis], slope, atol=1e-5, rtol=1e-5)
    if not sigma:
        torch.testing.assert_close(score[:2], -(points[:2] - 0.5) / 0.1**2, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_score_is_learned_and_drawn(lab, tmp_path, require_drawn):
    more_of = {"one": ["schedule.sigma_max=0.011"], "all": [], "energy": ["backbone=energy"]}
    for run, more in more_of.items():
        lab.done("train", "experiment=toy/score", *QUICK, *more, f"run_dir={run}")
    (tmp_path / "figures").mkdir()
    pictures = ["score_one_level.png", "score_levels.png", "energy.png"]
    require_drawn("write_up/score_figures.py", [*more_of], *pictures)
