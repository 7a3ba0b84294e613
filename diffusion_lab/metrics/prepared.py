"""Metrics with all that samples are compared with, for an evaluation or for any loop."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute.distributed import cached, on_rank_zero
from diffusion_lab.data import ImageData, Split
from diffusion_lab.metrics.extractor.base import FEATURES
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.image_set import ImageSet, place_in_class, short_count
from diffusion_lab.metrics.metric import Values
from diffusion_lab.metrics.observer import Observed
from diffusion_lab.metrics.quantity import ON_REQUEST, REAL, Protocol
from diffusion_lab.metrics.real_images import RealImages


@dataclass(frozen=True)
class PreparedMetrics:
    """The metrics with everything that samples are compared with."""

    metrics: GenerativeMetrics
    protocol: Protocol
    reference: ImageSet
    real: Values  # the values of test images, by full names
    test: ImageSet | None  # for metrics by class: the test images in random order

    @classmethod
    def of(cls, metrics: GenerativeMetrics, source: ImageData) -> Self:
        """Computes or reads what samples are compared with; call it on all ranks after `load`."""
        facts, chosen = metrics.reference_facts(source), metrics.reference_ids(source)
        kept = (metrics.observer, facts, metrics.cache_dir)
        reference = metrics.compared_with.image_set(source, chosen, *kept)
        if metrics.keep_images and len(reference):
            vars(reference)["images"] = metrics.reference_split(source).images[chosen]
        real, test = real_values(metrics, source, reference)
        return cls(metrics, metrics.protocol_of(source), reference, real, test)

    def collection(self) -> MetricCollection:
        """The metrics for any loop, with update(images, labels), compute and reset of torchmetrics.

        The networks see each image once for all of them. The values of test images are in `real`.
        """
        named: dict[str, Metric | MetricCollection] = {}
        for metric in self.metrics.metrics:
            metric.compare_with(self.reference, self.metrics.observer)
            named[metric.quantities[0].name] = metric
        return MetricCollection(named, compute_groups=[list(named)])

    def compute(self, observed: Observed, labels: Tensor | None) -> Values:
        """The values of the observed samples, with labels (n,), and of test images.

        Labels that are no classes say nothing to metrics. All ranks call this with the same
        arguments, rank 0 computes, and all get its result.
        """
        if labels is not None and labels.ndim > 1:
            labels = None
        count = len(observed[FEATURES])
        if count != self.metrics.num_samples:
            raise ValueError(
                f"num_samples={self.metrics.num_samples}, but {count} images were given"
            )
        return on_rank_zero(
            lambda: self._compute(self.metrics.observer.image_set(observed, labels))
        )

    def _compute(self, images: ImageSet) -> Values:
        results = self.metrics.results
        values = results(images, self.reference) | self.real
        if self.test is None or images.labels is None:
            return values
        beside = results(
            self.test.matching(images.required_labels), self.reference, REAL, by_class=True
        )
        return values | results(images, self.reference, by_class=True) | beside


def real_values(
    metrics: GenerativeMetrics, source: ImageData, reference: ImageSet
) -> tuple[Values, ImageSet | None]:
    """The values of test images, and the test images for metrics by class, if there are any."""
    count, chosen = len(metrics.test_ids(source)), observed_tests(metrics, source)
    keep = metrics.by_class or metrics.fld  # features of test images, not only their values
    split = Split(source.test_images(), source.test_labels())
    tests = RealImages(split, chosen, "test", "test", metrics.cache_dir)
    labels = split.labels[chosen]

    def compute() -> dict[str, Tensor]:
        observed = tests.observe(metrics.observer)
        first = metrics.observer.image_set(observed, labels).select(slice(count))
        values = on_rank_zero(lambda: metrics.results(first, reference, REAL))
        tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
        return tensors | ({FEATURES: observed[FEATURES]} if keep else {})

    reader = metrics.observer.classifier
    facts: dict[str, Any] = metrics.reference_facts(source) | {
        "test": count,
        "half_splits": metrics.half_splits,
        "per_class": keep and len(chosen),
        "classifier": reader.fingerprint if reader else None,
        "spatial_dim": metrics.extractor.spatial_dim,
        "patch": metrics.patch and [metrics.patch, *metrics.observer.corner],
        **{name: True for name in ON_REQUEST if getattr(metrics, name)},
    }
    if own := metrics.extra_metrics:  # code outside the package may change, and its values with it
        facts["extra"] = [m.identity() for m in own]
    name = f"real-{reference.name}-{metrics.extractor.name}-{short_count(count)}"
    stored = cached(metrics.cache_dir, name, facts, compute)
    features = stored.pop(FEATURES, None)
    test = None if features is None else ImageSet(metrics.extractor, features, labels)
    if test is not None:
        vars(reference)["unseen"] = test.features[:count]
    return {name: value.item() for name, value in stored.items()}, test


def observed_tests(metrics: GenerativeMetrics, source: ImageData) -> Tensor:
    """The indices of the test images to observe; those of `test_ids` come first."""
    order = random_places(len(source.test_images()), None)
    observe = torch.arange(len(order)) < metrics.num_samples
    if metrics.by_class:
        most = -(-metrics.num_samples // len(source.class_names))  # most samples of one class
        observe |= place_in_class(source.test_labels()[order]) < most
    return order[observe]
