"""The evaluation of samples: drawn, observed by an extractor, and measured."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from diffusion_lab.assembly.pipeline.generator import Generator, draw
from diffusion_lab.common.messages import say
from diffusion_lab.compute.distributed import rank_and_world, shard
from diffusion_lab.data import ImageData
from diffusion_lab.metrics.generative import PreparedMetrics


class EvaluationStopped(Exception):
    """Raised on all ranks by an evaluation that was asked to stop."""


class Evaluated(NamedTuple):
    """The metrics of samples, and the wall-clock seconds that a process took for one of them.

    The first batch, which warms up, does not count if there are others.
    """

    metrics: dict[str, float]
    sampling_seconds: float | None  # None: this process drew none


def evaluate(
    pipeline: Generator,
    prepared: PreparedMetrics,
    datamodule: ImageData,
    batch_size: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluated:
    """Draws the samples that the metrics need, a share on each rank, and measures them.

    The caller sets autocast. Samples depend on `seed` and id alone, so any number of ranks and any
    batch size gives the same results, up to the network's rounding. All ranks call `stop` after
    each batch that all have, and agree on its answer: if it is true, EvaluationStopped is raised.
    """
    observe, count = prepared.metrics.observer, prepared.metrics.num_samples
    rank, world = rank_and_world()
    ids, common = shard(count, rank, world), -(-(count // world) // batch_size)
    observed, drawn, features, last = [], [], 0.0, time.perf_counter()
    for number, images in enumerate(draw(pipeline, ids, batch_size, seed)):
        if number < common and stop():
            raise EvaluationStopped
        if images.is_cuda:  # else the time of samples counts as features
            torch.cuda.synchronize(images.device)
        began = time.perf_counter()
        drawn.append((began - last, len(images)))
        observed.append(observe(datamodule.to_native(images)))
        last = time.perf_counter()
        features += last - began
    results = prepared.compute(observe.gather(observed), pipeline.labels(range(count)))
    spent = {"samples": sum(each for each, _ in drawn), "features": features}
    spent["metrics"] = time.perf_counter() - last
    words = ", ".join(f"{seconds:.1f} s for {what}" for what, seconds in spent.items())
    say(f"Evaluated {count:,} samples: {words}")
    seconds, images = torch.tensor(drawn[1:] or drawn or [(0.0, 0.0)]).sum(0).tolist()
    return Evaluated(results, seconds / images if images else None)
