"""The mixture in the plane: its points, its density and its score."""

import runpy
import sys

import pytest
import torch
from helpers.data_modules import data_of
from helpers.paths import ROOT
from PIL import Image

from diffusion_lab.common.images import to_float
from diffusion_lab.data.source import GaussianMixture

FIGURES = ROOT / "experiments/write_up/score_figures.py"


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
def test_the_score_is_learned_and_drawn(lab, tmp_path, monkeypatch):
    quick = ["experiment=toy/score", "trainer=cpu", "trainer.max_steps=60", "logger=none"]
    more_of = {"one": ["schedule.sigma_max=0.011"], "all": [], "energy": ["backbone=energy"]}
    for run, more in more_of.items():
        lab.done("train", *quick, *more, f"run_dir={run}")
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(sys, "argv", ["score_figures.py", *more_of, "--output", "figures"])
    runpy.run_path(str(FIGURES), run_name="__main__")
    for name in ("score_one_level.png", "score_levels.png", "energy.png"):
        with Image.open(tmp_path / "figures" / name) as picture:
            assert min(picture.size) > 400
