"""A metric of generated images: how it is computed, and what it is called everywhere.

n images, D features.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.metrics.distances import FeatureSet, Moments
from diffusion_lab.metrics.features import FeatureExtractor

HIGHER, LOWER = True, False  # which values of a quantity are better
REAL = "_real"  # ends the name of a value that is measured on test images instead of samples
FINGERPRINT = "fingerprint"
Protocol = dict[str, str | int]  # how values were measured; comparable if and only if equal
Values = dict[str, float]  # values by the names of quantities, or by full names


@dataclass(frozen=True)
class Quantity:
    """A number by which compositions are compared, as tables, plots and searches describe it."""

    name: str  # the first part of a result's name: fid, as in fid/inception/train60k-5k
    title: str
    meaning: str
    higher_is_better: bool
    percent: bool = False  # a share, which is printed as a percentage
    judged: bool = True  # whether `compare` judges by it
    tabled: bool = False  # whether its tables show it all the same

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
        """A difference, or a range of differences: 52, 47 to 57; shares in percentage points."""
        return " to ".join(f"{self.scale * end:.3g}" for end in ends) + " points" * self.percent


def with_fingerprint(protocol: Protocol) -> Protocol:
    """Adds the first 12 digits of a protocol's sha256 to it, under "fingerprint"."""
    content = json.dumps(protocol, sort_keys=True)
    return protocol | {FINGERPRINT: hashing.of_text(content)[:12]}


def short_count(count: int) -> str:
    """A number of images as written in names: 60000 -> 60k, 1234 -> 1234."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


@dataclass(frozen=True)
class ImageSet:
    """A set of images, represented by the outputs of networks for each of them."""

    extractor: FeatureExtractor
    features: Tensor  # (n, D) float32
    labels: Tensor | None = None  # (n,) int64; of samples, the requested classes
    guesses: Tensor | None = None  # (n,) int64; the classes that a classifier predicts
    split: str = "train"  # of a reference: train, val, or the beginning of a file's name
    given: Moments | None = None  # of a reference: statistics from a file, for FID to use
    unseen: Tensor | None = None  # (m, D), of a reference: features of test images, for FLD
    others: Mapping[str, Tensor] = field(default_factory=dict)  # (n, .) each: more outputs, by name

    def __len__(self) -> int:
        return len(self.features)

    @property
    def name(self) -> str:
        """The split and the number of images, as in the names of values: train60k."""
        return f"{self.split}{short_count(len(self))}"

    @cached_property
    def statistics(self) -> FeatureSet:
        """The features with their mean, covariance and kernel mean."""
        return FeatureSet(self.features)

    @cached_property
    def moments(self) -> dict[str, FeatureSet | Moments]:
        """The other outputs with their moments, by name; of a reference only the moments."""
        return {name: FeatureSet(rows) for name, rows in self.others.items()}

    @property
    def required_labels(self) -> Tensor:
        """The labels, for metrics that need them."""
        if self.labels is None:
            raise ValueError("the images have no labels")
        return self.labels

    def select(self, chosen: Tensor | slice) -> "ImageSet":
        """The set of the chosen images."""
        labels, guesses = (
            None if rows is None else rows[chosen] for rows in (self.labels, self.guesses)
        )
        others = {name: rows[chosen] for name, rows in self.others.items()}
        chosen_features = self.features[chosen]
        return replace(
            self, features=chosen_features, labels=labels, guesses=guesses, others=others
        )

    def matching(self, labels: Tensor) -> "ImageSet":
        """The first images of each class: the number of it in `labels` (m,), or all if fewer."""
        own = self.required_labels
        return self.select(place_in_class(own) < labels.bincount(minlength=int(own.max()) + 1)[own])


def place_in_class(labels: Tensor) -> Tensor:
    """The number of earlier images of the same class for each image, (n,), from labels (n,)."""
    of_class = labels[:, None] == labels.unique()  # (n, K)
    return (of_class.cumsum(0) * of_class).sum(1) - 1


class Metric(ABC):
    """A comparison of generated images with reference images.

    A subclass sets `quantities` and returns their values from `measure`. The option `extra` of
    `GenerativeMetrics` adds metrics to an evaluation.
    """

    quantities: ClassVar[tuple[Quantity, ...]]
    needs_labels: ClassVar[bool] = False  # whether the samples must be of known classes
    needs_images: ClassVar[bool] = True  # whether statistics are too little of a reference
    # whether real images are also measured class by class, with the samples' number of each
    by_class: ClassVar[bool] = False

    @abstractmethod
    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        """The values of the quantities by their names; empty where they cannot be computed."""

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        """The part of a value's name that says what it depends on: extractor, numbers of images."""
        return f"{generated.extractor.name}/{reference.name}-{short_count(len(generated))}"

    def fits(self, generated: ImageSet, reference: ImageSet) -> bool:
        """Whether the samples have the labels, and the reference the images, that are needed."""
        unlabelled = self.needs_labels and generated.labels is None
        return not unlabelled and not (self.needs_images and not len(reference))

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        """The values by full names, such as fid/inception/train60k-5k."""
        values = self.measure(generated, reference)
        protocol = self.protocol(generated, reference)
        return {f"{name}{suffix}/{protocol}": value for name, value in values.items()}
