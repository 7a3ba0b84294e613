"""The cost of the framework: Lightning's step over a bare loop's, samplers over the network's.

    python experiments/benchmarks/overhead.py [--rounds 8] [--threads 1] [--out FOLDER]

Both sides are measured in turns within one run; results are medians over rounds, with ranges.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import lightning
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.labels import Classes
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.data.loader import ImageBatch
from diffusion_lab.diffusion.estimate import Estimate, Given
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.training.callbacks import EMA, Interruption, Throughput
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.context import RunContext
from diffusion_lab.training.logger import JSONLines
from diffusion_lab.training.module import Optimization

BATCH, STEPS, SKIP = 64, 24, 4
SHAPE = (1, 28, 28)
SAMPLERS = {"euler": 20, "ddim": 20, "heun": 20, "dpm_solver": 20, "ddpm": 20}


def configuration():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", ["name=benchmark", f"batch_size={BATCH}", "lr_schedule=constant"])


def model():
    return build_model(configuration(), SHAPE, Classes.numbered(10))


def batches():
    images = torch.randint(0, 256, (BATCH, *SHAPE), dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,))
    while True:
        yield ImageBatch(images, labels)


def bare_step() -> float:
    """Measures seconds per step of a plain loop with the same loss, clipping, AdamW and average."""
    parts = model()
    network, objective = parts.denoiser, parts.objective
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=lambda a, b, _: torch._foreach_lerp_(a, b, 0.01)
    )
    times, stream = [], batches()
    for _ in range(STEPS):
        start = time.perf_counter()
        images, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(network, parts.first_stage.encode(images), Given(labels)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        times.append(time.perf_counter() - start)
    return statistics.median(times[SKIP:])


class StepTimes(lightning.Callback):
    """Records when each step ended."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, *arguments):
        self.ends.append(time.perf_counter())


class Stream:
    def __iter__(self):
        return batches()


def lightning_step() -> float:
    """Measures seconds per step of Lightning's loop, with the callbacks that work at each step."""
    parts = model()
    module = DiffusionModule(
        parts.denoiser,
        parts.objective,
        parts.first_stage,
        Optimization.configured(configuration()),
    )
    times = StepTimes()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=STEPS,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_train_batches=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Throughput(), EMA(), Interruption(), times],
    )
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(BATCH)
        rows = JSONLines(Path(folder) / "metrics.jsonl", clock)
        module.context = RunContext(Path(folder), clock, PeakMemory(module.device), rows)
        trainer.fit(module, Stream())
    steps = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
    return statistics.median(steps[SKIP - 1 :])


def sampler_shares(rounds: int) -> dict[str, float]:
    """Measures a step of each sampler, without the network, as a share of a batch-64 bf16 pass."""
    parts = model()
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
    ratios = []
    for _ in range(options.rounds):
        bare, framework = bare_step(), lightning_step()
        ratios.append(framework / bare)
        print(f"bare {bare * 1e3:.1f} ms  lightning {framework * 1e3:.1f} ms", flush=True)
    result = {
        "threads": options.threads,
        "lightning_over_bare": {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        },
        "sampler_step_over_forward": sampler_shares(options.rounds),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        (options.out / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
