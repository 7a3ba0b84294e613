"""The pictures of the theory page: every schedule in logSNR, and sampling paths in the plane.

    python experiments/theory/figures.py outputs/two_moons/RUN

The run is one of experiment=toy/two_moons; pictures go into its folder, or to --output.
"""

import argparse
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure

from diffusion_lab import runs
from diffusion_lab.analysis import plots
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.images import to_float
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.sampler import Ancestral, AnnealedLangevin, Heun, Sampler
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid, UniformLogSNR

SAMPLES, PATHS = 300, 6  # samples drawn in each panel, and paths
SAMPLERS: dict[str, Sampler] = {
    "DDPM, 100 steps": Ancestral(100, UniformGrid(), eta=1.0),
    "DDIM, 100 steps": Ancestral(100, UniformGrid(), eta=0.0),
    "Heun, 12 steps": Heun(12, UniformGrid()),
    "annealed Langevin, 100 levels x 10": AnnealedLangevin(
        100, UniformLogSNR(sigma_max=10.0), corrections=10, step_size=0.1
    ),
}


def draw_schedules(path: Path) -> None:
    """Plots logSNR over t of every option of the group `schedule`: closed forms, and tables."""
    figure = Figure((11, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(
        panels, ("closed forms", "tables and what is made of them"), strict=True
    ):
        axes.set(title=title, xlabel="t (0 = data, 1 = noise)", ylim=(-22, 22))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("logSNR")
    t = torch.linspace(0, 1, 1000)[1:-1]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in sorted(option.stem for option in (conf_dir() / "schedule").glob("*.yaml")):
            schedule = instantiate(compose(overrides=[f"+schedule={name}"]).schedule)
            axes = panels[int(schedule.discrete_steps is not None)]
            style = ("-", "--", ":")[len(axes.lines) % 3]
            axes.plot(t, schedule(t).logsnr, style, label=name)
    for axes in panels:
        axes.legend(fontsize="small")
    plots.save(figure, path)


@torch.inference_mode()
def draw_paths(run: Path, path: Path) -> None:
    """Plots the states of each sampler, from the same noise, over the data."""
    datamodule, model = runs.load(run)
    data = to_float(datamodule.train_images()[:2000]).flatten(1)
    ids = range(SAMPLES)
    labels = torch.tensor(ids) % 2
    figure = Figure((9, 9), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (name, sampler) in zip(panels, SAMPLERS.items(), strict=True):
        noise = SampleNoise(0, ids)
        levels = sampler.time_grid(model.schedule, sampler.steps)
        x = levels[0].sigma * noise((2, 1, 1))
        denoise = Guidance().bind(model.denoiser.eval(), labels)
        walk = sampler.walk(denoise, x, levels, model.schedule, noise.randn_like)
        states = torch.stack([x, *walk]).flatten(2)  # (steps + 1, B, 2)
        axes.set(title=name, aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
        axes.scatter(*data.T, s=1, color="lightgrey")
        for index in range(PATHS):
            axes.plot(*states[:, index].T, linewidth=0.7, alpha=0.5, color=f"C{labels[index]}")
        axes.scatter(*states[0, :PATHS].T, s=16, facecolors="white", edgecolors="black", zorder=3)
        axes.scatter(*states[-1].T, s=4, c=[f"C{label}" for label in labels], zorder=2)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of experiment=toy/two_moons")
    parser.add_argument("--output", type=Path, help="folder of the pictures; default: the run's")
    arguments = parser.parse_args()
    folder = arguments.output or arguments.run
    draw_schedules(folder / "schedules.png")
    draw_paths(arguments.run, folder / "paths.png")
    print(f"Pictures: {folder / 'schedules.png'}, {folder / 'paths.png'}")


if __name__ == "__main__":
    main()
