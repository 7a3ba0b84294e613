"""One evaluation: draw the samples, take their features, compare with the reference."""

import time

import torch

from diffusion_lab.data import ImageDataModule
from diffusion_lab.distributed import rank_and_world, shard
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.pipeline import Pipeline, draw
from diffusion_lab.progress import say


def evaluate(
    pipeline: Pipeline,
    metrics: GenerativeMetrics,
    datamodule: ImageDataModule,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """The metrics of `metrics.num_samples` samples; every rank draws its share of their ids.

    The caller has prepared `metrics` and sets autocast. Samples depend on `seed` and id alone, so
    any number of ranks and any batch size gives the same figures, up to the network's rounding.
    """
    ids = shard(metrics.num_samples, *rank_and_world())
    observed, clock = [], Stopwatch()
    for images in draw(pipeline, ids, batch_size, seed):
        if images.is_cuda:  # or features would wait for the samples
            torch.cuda.synchronize(images.device)
        clock.lap("samples")
        observed.append(metrics.observe(datamodule.to_native(images)))
        clock.lap("features")
    labels = pipeline.labels(range(metrics.num_samples))
    figures = metrics.compute(metrics.gather(observed, ids), labels)
    clock.lap("figures")
    say(f"Evaluated {metrics.num_samples:,} samples: {clock}")
    return figures


class Stopwatch:
    """Wall-clock seconds by what they were spent on."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Counts the time since the lap before."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        return ", ".join(f"{value:.1f} s for {what}" for what, value in self.seconds.items())
