"""The cost of watching a run: steps with and without it, timed in turns in one training.

    python experiments/benchmarks/watching.py "experiment=quickstart" "experiment=fashion_mnist/dit"
        [--rounds 15] [--threads 1]

Each argument is a recipe: overrides of `diffusion-lab train`. A batch has two micro-batches, so
that the gradient noise scale is known. Steps take turns: plain, with the loss by noise level (in a
row), with the statistics of the step, and with the noise scale, too. Prints for each the median
CPU time of a step, and its ratio to the plain step of the same round, with the range over rounds;
the time of the callback for the loss by level alone, which is below what the ratios can show; and
that of a strip of denoising, drawn after the last step, as a share of the steps between two strips.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from diffusion_lab.assembly.objects import read_data
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.formats import markdown_table
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.estimate import budget
from diffusion_lab.training.callbacks import LevelLosses, Statistics, Throughput
from diffusion_lab.training.logger import Clock, JSONLines
from diffusion_lab.training.module import RunContext
from diffusion_lab.training.task import build_task
from diffusion_lab.training.trainer import build_trainer, quiet_lightning

WARM_UP = 2  # rounds
STRIPS = 3  # drawn
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


@dataclass
class Times:
    """Seconds of CPU time."""

    steps: dict[str, list[float]]  # of each step of a recipe, by what it did
    levels: float  # of the callback for the loss by level in a step
    strip: float  # of a strip of denoising
    apart: int  # steps between two strips


def timed(words: list[str], rounds: int, folder: Path) -> Times:
    """Trains a recipe in turns; returns what took how long."""
    steps = (WARM_UP + rounds) * len(TURNS)
    fixed = ["name=watching", "data.validation_size=0", "trainer.max_time=null"]
    fixed += [f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = budget.with_budget(compose("train", [*fixed, *words]), words)
    layout = solve_batch(cfg.batch_size, 1, cfg.batch_size // 2)
    task, levels, looks = build_task(cfg), Sometimes(), Statistics()
    turns = Turns(levels, looks)
    watching = [turns, levels, looks, Throughput(), End(turns)]
    trainer = build_trainer(cfg, layout, torch.device("cpu"), watching)
    read_data(cfg, task.datamodule)
    trainer.limit_val_batches = 0
    clock = Clock(cfg.batch_size)
    rows = JSONLines(folder / "metrics.jsonl", clock)
    memory = PeakMemory(torch.device("cpu"))
    task.module.context = RunContext(folder, clock, memory, rows, pipeline=task.pipeline)
    trainer.loggers = [rows]
    strip = instantiate(cfg.callbacks.denoising)
    with quiet_lightning():
        trainer.fit(task.module, datamodule=task.datamodule)
    begin = time.process_time()
    for _ in range(STRIPS):
        strip.draw(trainer)
    return Times(
        {turn: seconds[WARM_UP:] for turn, seconds in turns.seconds.items()},
        layout.accumulate * statistics.mean(levels.seconds[WARM_UP:]),
        (time.process_time() - begin) / STRIPS,
        strip.every_n_steps,
    )


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
            found = timed(recipe.split(), chosen.rounds, Path(folder))
        print(f"{recipe}: {1000 * found.levels:.2f} ms for the loss by level and a row of it")
        between = found.apart * statistics.median(found.steps["plain"])
        print(
            f"a strip of denoising: {found.strip:.2f} s, one in {found.apart} steps, "
            f"which are {found.strip / between:.2%} of their time"
        )
        for turn, seconds in found.steps.items():
            pairs = zip(seconds, found.steps["plain"], strict=True)
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
