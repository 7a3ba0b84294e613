"""Pictures of score-based models: why the data need noise, and how Langevin dynamics use it.

    python experiments/write_up/score_figures.py ONE_LEVEL ALL_LEVELS ENERGY [--output FOLDER]

The runs are of experiment=toy/score: ONE_LEVEL with hardly any noise (schedule.sigma_max=0.011),
ALL_LEVELS with its own schedule, and ENERGY with backbone=energy. Writes score_one_level.png,
score_levels.png and energy.png, and prints how far what was learned is from what is exact.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.analysis import plots
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.data.source.plane import GaussianMixture
from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.sampler import AnnealedLangevin
from diffusion_lab.diffusion.sampler.time_grid import UniformLogSNR
from diffusion_lab.diffusion.schedule import NoiseSchedule

ARROWS, CELLS, REACH = 15, 200, 1.2  # arrows and cells of a side, and the plane's half width
SHOWN = (0.1, 0.3, 1.0)  # levels of noise, as sigma
PATHS, POINTS = 8, 300
DEEP = 6  # contours of the log density: from this much below its maximum, one apart


class Learned:
    """The score network of a run."""

    def __init__(self, run: Path):
        datamodule, model = runs.load(run)
        self.source: GaussianMixture = datamodule.source
        self.schedule: NoiseSchedule = model.schedule
        self.backbone = model.denoiser.backbone
        self.denoise: DenoiseFn = Guidance().bind(model.denoiser.eval(), None)

    @torch.inference_mode()
    def score(self, points: Tensor, sigma: float) -> Tensor:
        """The learned score (x0 - x) / sigma^2 at points (N, 2), at the level of noise sigma."""
        level = self.schedule.at_logsnr(torch.tensor([-2 * math.log(sigma)], dtype=torch.float64))
        x = points[:, :, None, None].float()
        estimate = self.denoise(x, level[0]).x0
        return ((estimate - x) / sigma**2)[:, :, 0, 0]

    @torch.inference_mode()
    def log_density(self, points: Tensor, sigma: float) -> Tensor:
        """The learned log density (N,), less its mean, of the network Energy at points (N, 2).

        The network's output is sigma times the score, and the gradient of its potential by its own
        input, which is x over a number.
        """
        asked: list[tuple] = []
        hook = self.backbone.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
        self.score(points, sigma)
        hook.remove()
        (inputs,) = asked
        over = points[0, 0] / inputs[0][0, 0, 0, 0]
        potential = self.backbone.potential(*inputs) * over / sigma
        return potential - potential.mean()


def grid(side: int) -> Tensor:
    """Points (side^2, 2) of a square grid over the plane, row by row."""
    line = torch.linspace(-REACH, REACH, side)
    return torch.cartesian_prod(line, line).flip(1)


def cosine(ours: Tensor, exact: Tensor) -> Tensor:
    """The cosine of the angle between vectors (N, 2): 1 where directions agree."""
    return torch.nn.functional.cosine_similarity(ours, exact, dim=1)


def arrows(axes: Axes, source: GaussianMixture, score: Tensor, sigma: float, title: str) -> None:
    """Draws directions (side^2, 2) over the density; an arrow's length grows as its root's root."""
    log_density = source.log_density(grid(CELLS), sigma).view(CELLS, CELLS)
    extent = (-REACH, REACH, -REACH, REACH)
    axes.imshow(log_density.exp(), origin="lower", extent=extent, cmap="Blues", vmax=None)
    size = score.norm(dim=1, keepdim=True).clamp(min=1e-9)
    directions = score / size * size.sqrt().sqrt()
    axes.quiver(*grid(ARROWS).T, *directions.T, width=0.004, color="#b8430a")
    axes.set(title=title, aspect="equal", xlim=(-REACH, REACH), ylim=(-REACH, REACH))


def one_level(learned: Learned, path: Path) -> None:
    """Draws the exact and the learned score at one small level, and where the two agree."""
    sigma, source = 0.01, learned.source
    figure = Figure((12, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    arrows(panels[0], source, source.score(grid(ARROWS), sigma), sigma, "exact score")
    ours = learned.score(grid(ARROWS), sigma)
    arrows(panels[1], source, ours, sigma, f"learned at sigma = {sigma} alone")
    cells = grid(CELLS)
    agreement = cosine(learned.score(cells, sigma), source.score(cells, sigma))
    extent = (-REACH, REACH, -REACH, REACH)
    shown = panels[2].imshow(
        agreement.view(CELLS, CELLS), origin="lower", extent=extent, cmap="RdYlGn", vmin=-1, vmax=1
    )
    figure.colorbar(shown, ax=panels[2], label="cosine of the angle to the exact score")
    panels[2].contour(
        *(cells.T.reshape(2, CELLS, CELLS)),
        source.log_density(cells, sigma).view(CELLS, CELLS),
        levels=[-4, 0],
        colors="black",
        linewidths=0.8,
    )
    panels[2].set(title="right where the data are (black lines)")
    plots.save(figure, path)
    data = source.points(2000, torch.Generator().manual_seed(2))[0]
    away = cells[source.log_density(cells, sigma) < -4]
    for name, points in (("on data", data), ("where the log density is below -4", away)):
        found = cosine(learned.score(points, sigma), source.score(points, sigma))
        print(f"one level, {name}: mean cosine {found.mean():.3f}")


@torch.inference_mode()
def paths_of(learned: Learned) -> Tensor:
    """States (steps + 1, POINTS, 2) of annealed Langevin dynamics from the largest noise."""
    sampler = AnnealedLangevin(
        20, UniformLogSNR(sigma_min=0.01, sigma_max=2.0), corrections=10, step_size=0.1
    )
    noise = SampleNoise(0, range(POINTS))
    levels = sampler.time_grid(learned.schedule, sampler.steps)
    x = levels[0].sigma * noise((2, 1, 1))
    walk = sampler.walk(learned.denoise, x, levels, learned.schedule, noise.randn_like)
    return torch.stack([x, *walk]).flatten(2)


def all_levels(learned: Learned, path: Path) -> None:
    """Draws the learned score at several levels, and paths of annealed Langevin dynamics."""
    source = learned.source
    figure = Figure((4 * (len(SHOWN) + 1), 4.2), dpi=100, layout="constrained")
    *panels, last = figure.subplots(1, len(SHOWN) + 1)
    for axes, sigma in zip(panels, reversed(SHOWN), strict=True):
        arrows(axes, source, learned.score(grid(ARROWS), sigma), sigma, f"sigma = {sigma:g}")
        cells = grid(CELLS)
        found = cosine(learned.score(cells, sigma), source.score(cells, sigma))
        print(f"all levels, sigma {sigma:g}, whole plane: mean cosine {found.mean():.3f}")
    langevin(last, learned)
    plots.save(figure, path)


def langevin(axes: Axes, learned: Learned) -> None:
    """Draws where annealed Langevin dynamics end, and the ways of a few points there."""
    states = paths_of(learned)
    ends, share = states[-1], learned.source.share
    axes.scatter(*ends.T, s=4, color="#0b5fa5")
    for index in range(PATHS):
        axes.plot(*states[:, index].T, linewidth=0.8, alpha=0.7, color="#b8430a")
    axes.scatter(*states[0, :PATHS].T, s=18, facecolors="white", edgecolors="black", zorder=3)
    axes.set(title="annealed Langevin paths", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    lower = (ends.sum(1) < 0).double().mean()
    print(f"annealed Langevin: {lower:.3f} of the points at the first centre, data {share}")


def energy(learned: Learned, path: Path) -> None:
    """Draws the log density that a scalar network learned beside the exact one, and its paths."""
    figure = Figure((4 * (len(SHOWN) + 1), 4.2), dpi=100, layout="constrained")
    *panels, last = figure.subplots(1, len(SHOWN) + 1)
    cells = grid(CELLS)
    places = cells.T.reshape(2, CELLS, CELLS)
    for axes, sigma in zip(panels, reversed(SHOWN), strict=True):
        exact = learned.source.log_density(cells, sigma)
        near = exact > exact.max() - DEEP
        ours = learned.log_density(cells, sigma)
        ours = ours + (exact - ours)[near].mean()
        error = (exact - ours)[near].square().mean().sqrt()
        print(f"energy, sigma {sigma:g}: error of the log density {error:.3f}")
        levels = exact.max().item() + torch.arange(-DEEP, 0.5).numpy()
        for values, look in ((exact, "dotted"), (ours, "solid")):
            axes.contour(*places, values.view(CELLS, CELLS), levels, linestyles=look)
        axes.set(title=f"log density, sigma = {sigma:g}", aspect="equal")
    langevin(last, learned)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one_level", type=Path, help="run of one level of noise")
    parser.add_argument("all_levels", type=Path, help="run of all levels of noise")
    parser.add_argument("energy", type=Path, help="run of a scalar network")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    chosen = parser.parse_args()
    one_level(Learned(chosen.one_level), chosen.output / "score_one_level.png")
    all_levels(Learned(chosen.all_levels), chosen.output / "score_levels.png")
    energy(Learned(chosen.energy), chosen.output / "energy.png")


if __name__ == "__main__":
    main()
