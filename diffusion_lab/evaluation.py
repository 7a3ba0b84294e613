"""One evaluation: draw the samples, take their features, compare with the reference."""

from diffusion_lab.data import ImageDataModule
from diffusion_lab.distributed import rank_and_world, shard
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.pipeline import Pipeline, draw


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
    observed = [
        metrics.observe(datamodule.to_native(images))
        for images in draw(pipeline, ids, batch_size, seed)
    ]
    labels = pipeline.labels(range(metrics.num_samples))
    return metrics.compute(metrics.gather(observed, ids), labels)
