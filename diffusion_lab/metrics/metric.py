"""A metric of generated images: how it is computed, and what it is called everywhere.

n images, D features.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.metrics.distances import FeatureSet
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.protocol import short_count

HIGHER, LOWER = True, False  # which values of a quantity are better
REAL = "_real"  # ends the name of a value that test images have in the place of samples


@dataclass(frozen=True)
class Quantity:
    """A number by which compositions are compared, as tables, plots and searches describe it."""

    name: str  # the first part of a result's name: fid, as in fid/inception/train60k-5k
    title: str
    meaning: str
    higher_is_better: bool
    percent: bool = False  # a share, which is printed as a percentage
    judged: bool = True  # whether `compare` judges by it

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def axis_title(self) -> str:
        """The title with its unit."""
        return self.title + (" (%)" if self.percent else "")

    @property
    def scale(self) -> int:
        """The factor between a value and the number that is printed."""
        return 100 if self.percent else 1

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`."""
        return a > b if self.higher_is_better else a < b

    def text(self, value: float) -> str:
        """A value in four digits; a share as a percentage."""
        return f"{value:.1%}" if self.percent else f"{value:.4g}"

    def number(self, value: float) -> str:
        """A value in three digits; a share as a percentage."""
        return f"{self.scale * value:.3g}" + (" %" if self.percent else "")

    def gap(self, *ends: float) -> str:
        """A gap or a width, or a range of them: 52, 47 to 57; in percentage points for shares."""
        return " to ".join(f"{self.scale * end:.3g}" for end in ends) + " points" * self.percent


@dataclass(frozen=True)
class ImageSet:
    """A set of images, by what networks made of each of them."""

    extractor: FeatureExtractor
    features: Tensor  # (n, D) float32
    labels: Tensor | None = None  # (n,) int64; those that were asked for, of samples
    guesses: Tensor | None = None  # (n,) int64; the classes that a classifier reads
    stored: FeatureSet | None = None  # the statistics, where they were computed before

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def statistics(self) -> FeatureSet:
        """Mean, covariance and kernel mean of the features."""
        return self.stored or FeatureSet.of(self.features)

    @property
    def logits(self) -> Tensor | None:
        """The extractor's logits (n, K), if it is a classifier."""
        logits = self.extractor.logits(self.features)
        return None if logits is None else logits.cpu()

    @property
    def required_labels(self) -> Tensor:
        """The labels, for metrics that need them."""
        if self.labels is None:
            raise ValueError("the images have no labels")
        return self.labels

    def select(self, chosen: Tensor | slice) -> "ImageSet":
        """A part of the images."""
        labels, guesses = (
            None if rows is None else rows[chosen] for rows in (self.labels, self.guesses)
        )
        features = self.features[chosen]
        return replace(self, features=features, labels=labels, guesses=guesses, stored=None)

    def of_class(self, label: int) -> "ImageSet":
        """The images of one class, in order."""
        return self.select(self.required_labels == label)

    def matching(self, labels: Tensor) -> "ImageSet":
        """The first images of each class, as many as `labels` (m,) holds of it, if there are."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            chosen[(self.required_labels == label).nonzero()[:count, 0]] = True
        return self.select(chosen)


class Metric(ABC):
    """A comparison of generated images with reference images.

    A subclass sets `quantities`, and `measure` returns their values. It is given to an evaluation
    by the option `extra` of `GenerativeMetrics`.
    """

    quantities: ClassVar[tuple[Quantity, ...]]
    needs_labels: ClassVar[bool] = False  # whether the samples must be of known classes
    # whether real images are measured beside samples class by class, as many of each as of samples
    by_class: ClassVar[bool] = False

    @abstractmethod
    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        """The values of the quantities by their names; empty where they cannot be computed."""

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        """What the values depend on, for their names: extractor and numbers of images."""
        counts = f"train{short_count(len(reference))}-{short_count(len(generated))}"
        return f"{generated.extractor.name}/{counts}"

    def results(
        self, generated: ImageSet, reference: ImageSet, suffix: str = ""
    ) -> dict[str, float]:
        """The values by whole names, such as fid/inception/train60k-5k."""
        values = self.measure(generated, reference)
        protocol = self.protocol(generated, reference)
        return {f"{name}{suffix}/{protocol}": value for name, value in values.items()}
