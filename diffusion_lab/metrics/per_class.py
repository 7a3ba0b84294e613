"""The FID of each class, and its floor: that of as many real test images of the class.

n images, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.metrics.distances import frechets_of
from diffusion_lab.metrics.protocol import short_count


class Labelled(NamedTuple):
    """Features (n, D) and the classes of their images (n,) int64."""

    features: Tensor
    labels: Tensor

    def of(self, label: int) -> Tensor:
        """The features of one class, in order."""
        return self.features[self.labels == label]


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Whether an image is among the first `count` of its class, (n,) bool, by labels (n,)."""
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        first[(labels == label).nonzero()[:count, 0]] = True
    return first


def class_distances(
    generated: Labelled, test: Labelled, reference: Labelled, extractor: str
) -> dict[str, float]:
    """By whole names, as `fid_class3/<extractor>/train6k-500`: images of that class on both sides.

    The floor is of the first test images, equally many, or of all where there are fewer; the name
    says how many. A class with fewer than 2 images on a side has no figure.
    """
    values = {}
    for label in reference.labels.unique().tolist():
        ours, real = generated.of(label), reference.of(label)
        sides = {"": ours, "_floor": test.of(label)[: len(ours)]}
        sides = {kind: features for kind, features in sides.items() if len(features) >= 2}
        if "" not in sides or len(real) < 2:
            continue
        distances = frechets_of(real, list(sides.values()))
        for (kind, features), distance in zip(sides.items(), distances, strict=True):
            counts = f"train{short_count(len(real))}-{short_count(len(features))}"
            values[f"fid_class{label}{kind}/{extractor}/{counts}"] = distance
    return values
