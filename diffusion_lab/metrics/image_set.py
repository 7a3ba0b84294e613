"""A set of images as metrics see it: the outputs of networks for each image.

n images, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from diffusion_lab.metrics.distances import FeatureSet, Moments
from diffusion_lab.metrics.extractor.base import FeatureExtractor


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
    images: Tensor | None = None  # (n, C, H, W) uint8, if a metric looks at the images themselves

    def __len__(self) -> int:
        return len(self.features)

    @property
    def name(self) -> str:
        """The split and the number of images, as in the names of values: train60k."""
        return f"{self.split}{short_count(len(self))}"

    @cached_property
    def statistics(self) -> FeatureSet:
        """The features with their mean, covariance and kernel mean."""
        return FeatureSet(self.features, self.extractor.compares_on)

    @cached_property
    def moments(self) -> dict[str, FeatureSet | Moments]:
        """The other outputs with their moments, by name; of a reference only the moments."""
        return {
            name: FeatureSet(rows, self.extractor.compares_on) for name, rows in self.others.items()
        }

    @property
    def required_labels(self) -> Tensor:
        """The labels, for metrics that need them."""
        if self.labels is None:
            raise ValueError("the images have no labels")
        return self.labels

    def select(self, chosen: Tensor | slice) -> "ImageSet":
        """The set of the chosen images."""
        labels, guesses, images = (
            None if rows is None else rows[chosen]
            for rows in (self.labels, self.guesses, self.images)
        )
        others = {name: rows[chosen] for name, rows in self.others.items()}
        return replace(
            self,
            features=self.features[chosen],
            labels=labels,
            guesses=guesses,
            images=images,
            others=others,
        )

    def matching(self, labels: Tensor) -> "ImageSet":
        """The first images of each class: the number of it in `labels` (m,), or all if fewer."""
        own = self.required_labels
        return self.select(place_in_class(own) < labels.bincount(minlength=int(own.max()) + 1)[own])


def place_in_class(labels: Tensor) -> Tensor:
    """The number of earlier images of the same class for each image, (n,), from labels (n,)."""
    of_class = labels[:, None] == labels.unique()  # (n, K)
    return (of_class.cumsum(0) * of_class).sum(1) - 1
