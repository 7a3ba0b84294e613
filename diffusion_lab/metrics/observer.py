"""Runs networks on images, batch by batch and on all ranks, for the metrics to compare.

The outputs of networks for each image are what metrics see of a set. B or n images, C channels,
H x W pixels, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from diffusion_lab.common.messages import say, track
from diffusion_lab.compute.distributed import gather_shards, own_batches
from diffusion_lab.data import ImageData
from diffusion_lab.data.loader import Rows
from diffusion_lab.metrics.distances import FeatureSet, Moments
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import FEATURES, SPATIAL, FeatureExtractor


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
    given: Mapping[str, Moments] = field(default_factory=dict)  # of outputs, by a reference's file
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
        known = {name: getattr(self, name) for name in ("labels", "guesses", "images")}
        rows = {name: each[chosen] for name, each in known.items() if each is not None}
        others = {name: each[chosen] for name, each in self.others.items()}
        return replace(self, features=self.features[chosen], others=others, **rows)

    def matching(self, labels: Tensor) -> "ImageSet":
        """The first images of each class: the number of it in `labels` (m,), or all if fewer."""
        own = self.required_labels
        return self.select(place_in_class(own) < labels.bincount(minlength=int(own.max()) + 1)[own])


def place_in_class(labels: Tensor) -> Tensor:
    """The number of earlier images of the same class for each image, (n,), from labels (n,)."""
    of_class = labels[:, None] == labels.unique()  # (n, K)
    return (of_class.cumsum(0) * of_class).sum(1) - 1


CLASSIFIED, GUESSES = "classified", "guesses"  # the classifier's features and its classes
IMAGES, EDGES = "images", "edges"  # the images themselves, and what `edge_gradients` finds
BATCH = 64  # images per step of the progress bar
Observed = dict[str, Tensor]  # outputs of the networks, one row per image, on the CPU


@dataclass
class Observer:
    """The networks that observe images, and the side of the patches between which seams are."""

    extractor: FeatureExtractor
    classifier: Classifier | None = None
    patch: int | None = None
    keep: bool = False  # whether the images themselves are kept, too
    corner: tuple[int, int] = (0, 0)  # of the images in those that a model draws, which are padded

    def load(self, source: ImageData, device: torch.device | str) -> None:
        """Loads the networks; raises ExtractorUnavailable, also if one does not fit the data."""
        for network in filter(None, (self.extractor, self.classifier)):
            network.load(device)
            network.check(source)
        self.shape = source.native_shape
        if self.patch:
            drawn, native = source.image_shape[1:], source.native_shape[1:]
            if self.patch >= min(native):
                raise ValueError(
                    f"patch={self.patch} must be smaller than the images, which have "
                    f"{native[0]}x{native[1]} pixels"
                )
            self.corner = ((drawn[0] - native[0]) // 2, (drawn[1] - native[1]) // 2)

    def __call__(self, images: Tensor) -> Observed:
        """Computes the outputs for images, uint8 (B, C, H, W); returns them on the CPU."""
        observed = self.extractor.outputs(images)
        if self.classifier:
            features = self.classifier(images)
            guesses = self.classifier.logits(features).argmax(1)
            observed |= {CLASSIFIED: features, GUESSES: guesses}
        if self.patch:
            observed[EDGES] = edge_gradients(images, self.patch, self.corner)
        if self.keep:
            observed[IMAGES] = images
        return {name: rows.cpu() for name, rows in observed.items()}

    def no_rows(self) -> Observed:
        """The outputs for no images."""
        rows = {FEATURES: torch.empty(0, self.extractor.dim)}
        if self.extractor.spatial_dim:
            rows[SPATIAL] = torch.empty(0, self.extractor.spatial_dim)
        if self.classifier:
            rows[CLASSIFIED] = torch.empty(0, self.classifier.dim)
            rows[GUESSES] = torch.empty(0, dtype=torch.int64)
        if self.patch:
            rows[EDGES] = torch.empty(0, 2, dtype=torch.float64)
        if self.keep:
            rows[IMAGES] = torch.empty(0, *self.shape, dtype=torch.uint8)
        return rows

    def gather(self, observed: list[Observed]) -> Observed:
        """Gathers what each rank observed of its shard, in the order of the ids, on every rank."""
        names = self.no_rows()  # not those in `observed`, which is empty on a rank without images
        return {name: gather_shards([part[name] for part in observed]) for name in names}

    def all_of(self, images: Tensor | Rows, chosen: Tensor, description: str) -> Observed:
        """Observes the chosen images, each rank its share of them, and gathers the results."""
        mine = track(own_batches(len(chosen), BATCH), description)
        return self.gather([self(images[chosen[ids]]) for ids in mine])

    def once(self, images: Tensor | Rows, chosen: Tensor, word: str, folder: str) -> Observed:
        """Observes chosen images of a split, and says that the results are cached in a folder."""
        what = f"{self.extractor.name} features of {len(chosen):,} {word} images"
        say(f"Computing {what} once, to be cached in {folder}")
        return self.all_of(images, chosen, what)

    def image_set(self, observed: Observed, labels: Tensor | None) -> ImageSet:
        """Makes the set of the observed images for the metrics."""
        others = dict(observed)
        features, guesses = others.pop(FEATURES), others.pop(GUESSES, None)
        images = others.pop(IMAGES, None)
        return ImageSet(self.extractor, features, labels, guesses, others=others, images=images)


def edge_gradients(images: Tensor, patch: int, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """The mean absolute differences of neighbouring pixels, (B, 2) float64: across edges, inside.

    The images are (B, C, H, W) in any unit; `corner` is the row and the column of their first pixel
    in the image that the network writes, whose patches have `patch` x `patch` pixels.
    """
    found = []
    for axis, first in zip((2, 3), corner, strict=True):
        steps = images.double().diff(dim=axis).abs()
        places = torch.arange(1, images.shape[axis], device=images.device) + first
        across = places % patch == 0
        found.append([steps.index_select(axis, m.nonzero()[:, 0]) for m in (across, ~across)])
    sides = ([rows.flatten(1), columns.flatten(1)] for rows, columns in zip(*found, strict=True))
    return torch.stack([torch.cat(side, dim=1).mean(1) for side in sides], dim=1)
