"""Metrics with all that samples are compared with, for an evaluation or for any loop."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.metrics.features import FEATURES
from diffusion_lab.metrics.image_set import ImageSet
from diffusion_lab.metrics.metric import REAL, Protocol, Values
from diffusion_lab.metrics.observer import Observed

if TYPE_CHECKING:
    from diffusion_lab.metrics.generative import GenerativeMetrics


@dataclass(frozen=True)
class PreparedMetrics:
    """The metrics with everything that samples are compared with."""

    metrics: "GenerativeMetrics"
    protocol: Protocol
    reference: ImageSet
    real: Values  # the values of test images, by full names
    test: ImageSet | None  # for metrics by class: the test images in random order

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

        All ranks call this with the same arguments, rank 0 computes, and all get its result.
        """
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
