"""The cost of watching a run: steps with and without it, timed in turns in one training.

    python experiments/benchmarks/watching.py "experiment=quickstart" "experiment=fashion_mnist/dit"
        [--rounds 15] [--threads 1]

Each argument is a recipe: overrides of `diffusion-lab train`. A batch has two micro-batches, so
that the gradient noise scale is known. Steps take turns: plain, with the loss by noise level (in a
row), with the statistics of the step, and with the noise scale, too. Prints for each the median
CPU time of a step, and its ratio to the plain step of the same round, with the range over rounds;
and the time of the callback for the loss by level alone, which is below what the ratios can show.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback

from diffusion_lab.build.configuration import conf_dir
from diffusion_lab.build.objects import read_data
from diffusion_lab.common.formats import markdown_table
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.profiling import budget
from diffusion_lab.training.callbacks import LevelLosses, Statistics, Throughput
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.context import RunContext
from diffusion_lab.training.diffusion_task import build_diffusion_task
from diffusion_lab.training.logger import JSONLines
from diffusion_lab.training.trainer import build_trainer, quiet_lightning

WARM_UP = 2  # rounds
TURNS = ("plain", "loss by level", "statistics", "statistics and noise scale")


class Sometimes(LevelLosses):
    """Losses by level in some steps."""

    on = False

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []  # of each call

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.on:
            begin = time.process_time()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.seconds.append(time.process_time() - begin)


class Turns(Callback):
    """Switches the others on and off, and times steps; the first callback."""

    def __init__(self, levels: Sometimes, looks: Statistics):
        self.levels, self.looks = levels, looks
        self.seconds: dict[str, list[float]] = {turn: [] for turn in TURNS}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            place = trainer.global_step % len(TURNS)
            self.levels.on = place == 1
            self.looks.every_n_steps = 1 if place > 1 else None
            self.looks.noise_scale = place == 3
            self.begin = time.process_time()


class End(Callback):
    """Takes the time at the end of a step; the last callback."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            turn = TURNS[(trainer.global_step - 1) % len(TURNS)]
            self.turns.seconds[turn].append(time.process_time() - self.turns.begin)


def timed(words: list[str], rounds: int, folder: Path) -> tuple[dict[str, list[float]], float]:
    """The seconds of CPU time of each step of a recipe by what it did, and of a step's callback."""
    steps = (WARM_UP + rounds) * len(TURNS)
    fixed = ["name=watching", "tuning=none", "data.validation_size=0", "trainer.max_time=null"]
    fixed += [f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [*fixed, *words])
        budget.apply(cfg, words)
    layout = solve_batch(cfg.batch_size, 1, cfg.batch_size // 2)
    task, levels, looks = build_diffusion_task(cfg), Sometimes(), Statistics()
    turns = Turns(levels, looks)
    watching = [turns, levels, looks, Throughput(), End(turns)]
    trainer = build_trainer(cfg, layout, torch.device("cpu"), watching)
    read_data(cfg, task.datamodule)
    trainer.limit_val_batches = 0
    clock = Clock(cfg.batch_size)
    rows = JSONLines(folder / "metrics.jsonl", clock)
    task.module.context = RunContext(folder, clock, PeakMemory(torch.device("cpu")), rows)
    trainer.loggers = [rows]
    with quiet_lightning():
        trainer.fit(task.module, datamodule=task.datamodule)
    alone = layout.accumulate * statistics.mean(levels.seconds[WARM_UP:])
    return {turn: seconds[WARM_UP:] for turn, seconds in turns.seconds.items()}, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="+", help="overrides in quotes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lines = []
    for recipe in chosen.recipes:
        with tempfile.TemporaryDirectory() as folder:
            found, alone = timed(recipe.split(), chosen.rounds, Path(folder))
        print(f"{recipe}: {1000 * alone:.2f} ms for the loss by level and a row of it")
        for turn, seconds in found.items():
            pairs = zip(seconds, found["plain"], strict=True)
            ratios = sorted(own / plain for own, plain in pairs)
            lines.append(
                [
                    f"`{recipe}`",
                    turn,
                    f"{1000 * statistics.median(seconds):.0f}",
                    f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
                ]
            )
    print(markdown_table(["recipe", "step", "ms", "time by the plain step"], lines))


if __name__ == "__main__":
    main()
