"""The table of the theory page: the denoising loss of scores that were learned in four ways.

    python experiments/theory/score_losses.py outputs/score_losses

trains each way for 2,000 steps in a folder below the given one, unless it is there, and prints the
table. The last row is the loss of the exact score. `--steps` and names of ways make it shorter.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab import command, runs
from diffusion_lab.common.images import to_float
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, noise_of
from diffusion_lab.families.diffusion.module import losses_by_level

WAYS = {
    "denoising": ["objective/loss=denoising"],
    "denoising, as an energy": ["objective/loss=denoising", "backbone=energy"],
    "sliced score matching": ["objective/loss=sliced_score_matching"],
    "exact score matching": ["objective/loss=exact_score_matching"],
}


class ExactScore:
    """The denoiser of the score that a data source knows."""

    conditioning, self_conditioning, clip = None, False, None

    def __init__(self, source, prediction):
        self.source, self.prediction = source, prediction

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        """x (B, 2, 1, 1) at levels (B,) of a schedule that only adds noise."""
        score = torch.empty_like(x)
        for sigma in level.sigma.unique():
            own = level.sigma == sigma
            score[own] = self.source.score(x[own].flatten(1), float(sigma)).view_as(x[own])
        x0 = x + broadcast(level.sigma, x) ** 2 * score
        return Estimate(x0, None, self.prediction.target(x0, noise_of(x, x0, level), level))


def exact_loss(folder: Path) -> float:
    """The test loss of the exact score, as the run in a folder measures its own."""
    data, model = runs.load(folder)
    data.prepare_data()
    data.setup("fit")
    tested = data.tested_on()
    images, labels = tested.images[:], tested.labels
    exact = ExactScore(data.source, model.denoiser.prediction)
    ids = torch.arange(len(images))
    sums = losses_by_level(model.loss, model.schedule, exact, to_float(images), labels, ids)
    total, count = sums.sum(0)
    return float(total / count)


def main(folder: Path, steps: int, ways: list[str]) -> None:
    """Trains what is missing, and prints a row for each way."""
    print("| trained by | seconds | loss |\n| --- | ---: | ---: |")
    for way in ways:
        run = folder / way.replace(", ", "_").replace(" ", "_")
        if not (run / "summary.json").is_file():
            settings = ["experiment=toy/score_matching", "logger=none", "trainer.accelerator=cpu"]
            settings += [f"trainer.max_steps={steps}", f"run_dir={run}"]
            command("train", *settings, *WAYS[way])
        summary = runs.load_summary(run)
        loss, seconds = summary["metrics"]["test/loss"], summary["training_seconds"]
        print(f"| {way} | {seconds:.0f} | {loss:.4f} |", flush=True)
    print(f"| the exact score | | {exact_loss(run):.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    chosen = parser.parse_args()
    main(chosen.folder, chosen.steps, chosen.ways)
