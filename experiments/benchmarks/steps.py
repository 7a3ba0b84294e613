"""How many images do two recipes train on in the same time? Their steps, timed in turns.

    python experiments/benchmarks/steps.py "optimizer=adamw" "optimizer=muon"
        [--rounds 15] [--threads 1] [--sweep "experiment=quickstart"] [--calls]

Each argument is a recipe: overrides of `diffusion-lab train`, behind those of --sweep. Its network
is sized by its budget, and its step is forward, backward and optimiser, without clipping and
averaging; with --calls it is a network call, as in sampling. Prints, for each recipe, the median
seconds per image and their ratio to the first recipe's in the same round, with its range over the
rounds. So the images that a recipe gets in equal time do not depend on how busy the machine is.
"""

import argparse
import shlex
import statistics
import time

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from diffusion_lab.assembly.costs import image_facts
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.formats import markdown_table
from diffusion_lab.compute.device import device_and_precision
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.profile import WARM_UP, Bench

STEPS = 2  # of a recipe before the next one's turn


def composed(words: list[str]) -> DictConfig:
    """The configuration of a recipe, with a network of the size that its budget asks for."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", ["name=steps", *words])
        return budget.with_budget(cfg, words)


def bench_of(words: list[str]) -> Bench:
    cfg = composed(words)
    return Bench(cfg, image_facts(cfg), *device_and_precision("auto", "auto"))


def seconds_per_image(bench: Bench, calls: bool) -> float:
    step = bench.call if calls else bench.train
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - begin) / (STEPS * len(bench.images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="+", help="overrides in quotes")
    parser.add_argument("--sweep", default="", help="overrides of all recipes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", action="store_true", help="time network calls, not steps")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    benches = [
        bench_of([*shlex.split(chosen.sweep), *shlex.split(recipe)]) for recipe in chosen.recipes
    ]
    for bench in benches:
        for _ in range(WARM_UP):
            seconds_per_image(bench, chosen.calls)
    rounds = [
        [seconds_per_image(bench, chosen.calls) for bench in benches] for _ in range(chosen.rounds)
    ]
    lines = []
    for recipe, times in zip(chosen.recipes, zip(*rounds, strict=True), strict=True):
        ratios = sorted(own / first[0] for own, first in zip(times, rounds, strict=True))
        middle = statistics.median(ratios)
        lines.append(
            [
                f"`{recipe}`",
                f"{1000 * statistics.median(times):.3g}",
                f"{middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
                f"{1 / middle:.3f}",
            ]
        )
    print(markdown_table(["recipe", "ms per image", "time by the first", "images"], lines))


if __name__ == "__main__":
    main()
