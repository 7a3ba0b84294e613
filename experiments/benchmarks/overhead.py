"""The cost of the framework: a run's step beside a bare loop's, and samplers over the network's.

    python experiments/benchmarks/overhead.py [--rounds 8] [--threads 1] [--out FOLDER]

A step of a whole run of `diffusion-lab train`, with what it does by default, is compared with one
of the same network, loss, clipping, optimiser and average in a loop of ten lines. Networks are so
small that little else than the host's work is measured, in processor time. Both take turns; each
round counts by its best window of steps, and results are medians over rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import lightning
import overhead  # this file, as runs import it
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from diffusion_lab.assembly.costs import image_facts
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.cli.program import command
from diffusion_lab.common.formats import markdown_table
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import Estimate, Given
from diffusion_lab.estimate.profile import Bench

BATCH = 64  # of samplers
SHAPE = (1, 28, 28)
SAMPLERS = {"euler": 20, "ddim": 20, "heun": 20, "dpm_solver": 20, "ddpm": 20}
WINDOW, WINDOWS = 25, 6  # steps whose mean is taken, and how many such windows a round has
RUN = [
    *("batch_size=1", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "logger=none"),
    *("callbacks.evaluation=null", "callbacks.sample_grid=null", "data.validation_size=10"),
    *("data.validate_on=10", "validate_every_n_steps=1000000", "name=overhead"),
    f"trainer.max_steps={WINDOW * (WINDOWS + 1) + 1}",
]
NETWORKS = {
    "DiT": ["backbone=dit", "backbone.width=8", "backbone.heads=1", "backbone.depth=1"],
    "U-Net": ["backbone=unet_small", "backbone.channels=16"],
}
OPTIMIZERS = ("adamw", "muon")


def configuration(*overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", ["name=benchmark", *overrides])


class Bare(Bench):
    """A plain loop with the loss, clipping, optimiser and average of a run."""

    def steps(self, count: int) -> None:
        trained = self.parameters()
        average = [parameter.detach().clone() for parameter in trained]
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss(self.images, self.labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 0.01)


def bare_step(overrides: list[str]) -> float:
    """Measures the seconds of processor time of a step of the plain loop."""
    cfg = configuration(*overrides)
    bench = Bare(cfg, image_facts(cfg), torch.device("cpu"), "bf16-mixed")
    bench.steps(WINDOW)
    seconds = []
    for _ in range(WINDOWS):
        start = time.process_time()
        bench.steps(WINDOW)
        seconds.append((time.process_time() - start) / WINDOW)
    return min(seconds)


class StepTimes(lightning.Callback):
    """Takes the processor time at which each step begins."""

    begins: ClassVar[list[float]] = []

    def on_train_start(self, *_) -> None:
        self.begins.clear()

    def on_train_batch_start(self, *_) -> None:
        self.begins.append(time.process_time())


def program_step(overrides: list[str]) -> float:
    """Measures the seconds of processor time of a step of `diffusion-lab train`."""
    times = "+callbacks.times={_target_:overhead.StepTimes}"
    with tempfile.TemporaryDirectory() as folder:
        command("train", *overrides, times, f"run_dir={folder}/run")
    marks = overhead.StepTimes.begins[WINDOW::WINDOW]  # without the first window
    return min((end - begin) / WINDOW for begin, end in pairwise(marks))


def costs_of_steps(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, bare and of a run, by network and optimiser."""
    recipes = {
        f"{network}, {optimizer}": [*RUN, *words, f"optimizer={optimizer}"]
        for network, words in NETWORKS.items()
        for optimizer in OPTIMIZERS
    }
    found = {name: {"bare": [], "run": []} for name in recipes}
    for _ in range(rounds):
        for name, words in recipes.items():
            found[name]["bare"].append(1e3 * bare_step(words))
            found[name]["run"].append(1e3 * program_step(words))
    return {
        name: {side: round(statistics.median(each), 2) for side, each in sides.items()}
        for name, sides in found.items()
    }


def sampler_shares(rounds: int) -> dict[str, float]:
    """Measures a step of each sampler, without the network, as a share of a batch-64 bf16 pass."""
    parts = build_model(configuration(), SHAPE, Classes.numbered(10))
    network = parts.denoiser.eval()
    x = torch.randn(BATCH, *SHAPE)
    labels = torch.arange(BATCH) % 10
    level = parts.schedule(torch.tensor(0.5))
    walks = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name, steps in SAMPLERS.items():
            cfg = compose(overrides=[f"+sampler={name}", f"sampler.steps={steps}"])
            walks[name] = instantiate(cfg.sampler)

    def estimate(x, level):
        return Estimate(x)  # costs nothing, so that only the sampler is timed

    def seconds(action, times) -> float:
        start = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - start) / times

    shares = {name: [] for name in walks}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(rounds + 1):
            forward = seconds(lambda: network(x, level, Given(labels)), 5)
            for name, sampler in walks.items():
                own = seconds(lambda s=sampler: s(estimate, x, parts.schedule), 5) / sampler.steps
                shares[name].append(own / forward)
    return {name: statistics.median(values[1:]) for name, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = costs_of_steps(options.rounds)
    rows = [
        [name, f"{each['bare']:.2f}", f"{each['run']:.2f}", f"{each['run'] - each['bare']:.2f}"]
        for name, each in steps.items()
    ]
    print(markdown_table(["ms of a step", "bare", "run", "more"], rows))
    shares = sampler_shares(options.rounds)
    result = {"threads": options.threads, "steps": steps, "sampler_step_over_forward": shares}
    print(json.dumps(result, indent=2))
    if options.out:
        (options.out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
