"""The evaluation of samples: drawn, observed by an extractor, and measured."""

import time

import torch

from diffusion_lab.common.messages import say
from diffusion_lab.compute.distributed import rank_and_world, shard
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import PreparedMetrics
from diffusion_lab.pipeline.generator import Generator, draw


def evaluate(
    pipeline: Generator,
    prepared: PreparedMetrics,
    datamodule: ImageDataModule,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Draws the samples that the metrics need, a share on each rank, and returns the metrics.

    The caller sets autocast. Samples depend on `seed` and id alone, so any number of ranks and any
    batch size gives the same results, up to the network's rounding.
    """
    observe, count = prepared.metrics.observer, prepared.metrics.num_samples
    ids = shard(count, *rank_and_world())
    observed, clock = [], Stopwatch()
    for images in draw(pipeline, ids, batch_size, seed):
        if images.is_cuda:  # else the time of samples counts as features
            torch.cuda.synchronize(images.device)
        clock.lap("samples")
        observed.append(observe(datamodule.to_native(images)))
        clock.lap("features")
    results = prepared.compute(observe.gather(observed), pipeline.labels(range(count)))
    clock.lap("metrics")
    say(f"Evaluated {count:,} samples: {clock}")
    return results


class Stopwatch:
    """A stopwatch that adds up the wall-clock seconds spent on each activity."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Adds the time since the previous lap to the seconds of `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        return ", ".join(f"{value:.1f} s for {what}" for what, value in self.seconds.items())
