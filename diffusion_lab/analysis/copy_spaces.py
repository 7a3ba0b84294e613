"""The spaces in which copies of training images are searched for: features, and pixels.

N training images and n others, with D features or pixels.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.images import to_float
from diffusion_lab.compute.cache import cached
from diffusion_lab.data import Split
from diffusion_lab.metrics.extractor.base import FEATURES, FeatureExtractor
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.neighbours import detected, nearest_view
from diffusion_lab.metrics.observer import Observer
from diffusion_lab.metrics.real_images import RealImages

PIXELS = "pixels"
Views = dict[str, list[Tensor]]  # by space, the views (n, D) of the same images
Rates = dict[str, dict[str, float]]  # by space, the shares of images that were found


@dataclass(frozen=True)
class CopySpaces:
    """The training images, uint8 (N, C, H, W), in each space: the extractor's, and pixels.

    If `mirrored`, images are compared with them as mirror images, too.
    """

    metrics: GenerativeMetrics
    training: Tensor
    mirrored: bool

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """The training images (N, D) by space; their features are computed once and cached."""
        features = stored_features(self.metrics, self.training, "training")
        pixels = to_float(self.training).flatten(1)
        return {self.metrics.extractor.name: features, PIXELS: pixels}

    def views(self, images: Tensor, stored_as: str | None = None) -> Views:
        """The views (n, D) of images, uint8 (n, C, H, W), in each space.

        Their features are cached under the name `stored_as`, if it is given.
        """
        sides = [images, images.flip(-1)] if self.mirrored else [images]
        if stored_as is None:
            features = [features_of(self.metrics.extractor, side) for side in sides]
        else:
            features = [stored_features(self.metrics, side, stored_as) for side in sides]
        pixels = [to_float(side).flatten(1) for side in sides]
        return {self.metrics.extractor.name: features, PIXELS: pixels}


@dataclass(frozen=True)
class Detector:
    """The criteria by which an image counts as a copy; `limits` are distances by space."""

    spaces: CopySpaces
    limits: dict[str, float]

    def rates(self, images: Tensor, sources: Tensor) -> Rates:
        """The shares of images, uint8 (n, C, H, W), that count as copies, by each criterion.

        `sources` (n,) are the indices of the training images that they were made from;
        `source_found` is the share whose nearest training image is that one, or equal to it.
        """
        found, training = {}, self.spaces.training
        for name, views in self.spaces.views(images).items():
            distances, index = nearest_view(views, self.spaces.known[name], 2)
            equal = (training[index[:, 0]] == training[sources]).flatten(1).all(1)
            shares = detected(distances, self.limits[name])
            found[name] = shares | {"source_found": equal.double().mean().item()}
        return found


def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """The features (n, D) of images uint8 (n, C, H, W), of which each rank computes a share."""
    everything = torch.arange(len(images))
    return Observer(extractor).all_of(images, everything, f"{extractor.name} features")[FEATURES]


def stored_features(metrics: GenerativeMetrics, images: Tensor, name: str) -> Tensor:
    """The features (N, D) of images uint8 (N, C, H, W), computed once and then cached."""
    extractor, everything = metrics.extractor, torch.arange(len(images))
    key = {"images": hashing.of_tensors([images]), "extractor": extractor.fingerprint}
    split = RealImages(Split(images, everything), everything, name, name, metrics.cache_dir)

    def compute() -> dict[str, Tensor]:
        return {FEATURES: split.observe(Observer(extractor))[FEATURES]}

    return cached(metrics.cache_dir, f"{name}-{len(images)}-{extractor.name}", key, compute)[
        FEATURES
    ]
