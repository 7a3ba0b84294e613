"""Distances between two sets of images by their features, in float64.

The Frechet distance of N(m1, S1) and N(m2, S2) is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2).
With roots S1 = A^T A and S2 = B^T B, tr sqrt(S1 S2) is the sum of the singular values of A B^T:
exact also where a covariance is singular, and never complex. n images, D features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_lab.common.messages import UserError

BLOCK = 2048  # rows that are held in float64 at a time
SPLIT_SEED = 0  # seed of the random halves
MMD_WIDTH, MMD_SCALE = 10, 1000  # as published
DIRECTIONS, DIRECTION_SEED = 1000, 2020  # of MIND, as in torch-fidelity
TOGETHER = 2**24  # numbers that are sorted at once


def covariance_root(covariance: Tensor) -> Tensor:
    """The root A (D, D) with A^T A = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


@dataclass(frozen=True)
class Moments:
    """The mean of features and a root of their covariance, all that `frechet` needs of a set."""

    mean: Tensor  # (D,) float64
    root: Tensor  # (., D) float64
    name: str = ""  # in the names of values, if they are from a file


@dataclass(frozen=True)
class FeatureSet:
    """The features of one set of images; statistics for distances are computed on first use.

    They are on `device`, to which features are moved block by block. Raises UserError for fewer
    than 2 images, and for features that are not finite.
    """

    features: Tensor  # (n, D) float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        count = len(self.features)
        if count < 2:
            raise UserError(f"a distance needs at least 2 images on each side, not {count}")
        if not (finite := self.features.isfinite().all(1)).all():
            raise UserError(
                f"{count - finite.sum()} of {count} images have features that are not finite "
                f"(the first is number {finite.int().argmin()}); "
                "look at the images, or download the extractor's weights again"
            )

    def blocks(self) -> Iterator[Any]:
        """The features, float64, BLOCK at a time."""
        return (block.to(self.device).double() for block in self.features.split(BLOCK))

    @cached_property
    def mean(self) -> Tensor:
        """The mean (D,), float64."""
        return sum(block.sum(0) for block in self.blocks()) / len(self.features)

    @cached_property
    def root(self) -> Tensor:
        """The root A (min(n, D), D), float64, with A^T A the unbiased covariance."""
        count, dim = self.features.shape
        if count <= dim:
            return torch.cat([block - self.mean for block in self.blocks()]) / (count - 1) ** 0.5
        centred = (block - self.mean for block in self.blocks())
        return covariance_root(sum(block.T @ block for block in centred) / (count - 1))

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the second moment (D, D), float64, of the features at length 1."""
        mean, second = torch.zeros(2, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            units = functional.normalize(block)
            mean, second = mean + units.sum(0), second + units.T @ units
        return mean / len(self.features), second / len(self.features)

    @cached_property
    def self_kernel(self) -> Tensor:
        """The mean KID kernel over all pairs of different images, () float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, rows in enumerate(self.blocks()):
            within = _kernel(rows, rows)
            total += within.sum() - within.trace()
            total += 2 * sum(
                _kernel(rows, columns).sum() for columns in islice(self.blocks(), i + 1, None)
            )
        return total / (len(self.features) * (len(self.features) - 1))

    def statistics(self) -> dict[str, Tensor]:
        """All that distances need besides the features, on the CPU."""
        found = {"mean": self.mean, "root": self.root, "self_kernel": self.self_kernel}
        return {name: value.cpu() for name, value in found.items()}


def frechet(a: FeatureSet | Moments, b: FeatureSet | Moments) -> float:
    """The Frechet distance of two sets (FID, arXiv:1706.08500), biased upwards by about 1 / n."""
    mean, root = b.mean.to(a.mean.device), b.root.to(a.root.device)
    overlap = torch.linalg.svdvals(a.root @ root.T).sum()
    spread = a.root.square().sum() + root.square().sum() - 2 * overlap
    return ((a.mean - mean).square().sum() + spread).clamp(min=0).item()


def frechet_of_halves(a: FeatureSet, other: FeatureSet | Moments, splits: int) -> Tensor:
    """Frechet distances to `other` of both halves of n images, split at random: (2 splits,).

    The standard deviation of the halves' distances is the delete-half jackknife estimate for the
    distance of all n: conservative, too large by a third to two thirds for Gaussian features. Since
    the bias falls as 1 / n, 2 `frechet` minus the mean of the halves removes most of it
    (FID-infinity, arXiv:1911.07023) if n is several times D. For n below D the covariances are
    singular, the bias falls differently, and FID-infinity is not valid: it may even be negative.
    """
    features, half = a.features, len(a.features) // 2
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    values = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        for part in (order[:half], order[half : 2 * half]):
            values.append(frechet(FeatureSet(features[part], a.device), other))
    return torch.tensor(values, dtype=torch.float64)


def kid(a: FeatureSet, b: FeatureSet) -> float:
    """Kernel distance: squared MMD with (x.y / D + 1)^3, unbiased, on all pairs (arXiv:1801.01401).

    It is about 0 for two sets from the same distribution, and may be negative.
    """
    total = sum(_kernel(rows, columns).sum() for rows in a.blocks() for columns in b.blocks())
    between = total / (len(a.features) * len(b.features))
    return (a.self_kernel + b.self_kernel.to(a.device) - 2 * between).item()


def mmd(a: FeatureSet, b: FeatureSet) -> float:
    """The distance of CMMD (arXiv:2401.09603): a thousandfold squared MMD, biased, of directions.

    Features have length 1, and the kernel is exp(-|x - y|^2 / (2 s^2)) with s = 10. It is expanded
    in x.y / s^2, which is at most 0.01, to the second order: the relative error is below 1e-4, and
    neither time nor memory grows with the number of pairs. With so wide a kernel the distance of
    the mean directions is 99 % of the value.
    """
    (mean, second), (other_mean, other_second) = a.directions, b.directions
    first = (mean - other_mean.to(mean.device)).square().sum() / MMD_WIDTH**2
    rest = (second - other_second.to(mean.device)).square().sum() / (2 * MMD_WIDTH**4)
    return MMD_SCALE * math.exp(-1 / MMD_WIDTH**2) * (first + rest).item()


def mind(a: FeatureSet, b: FeatureSet) -> float:
    """The distance of MIND (arXiv:2605.06797), 3 D times the squared sliced Wasserstein distance.

    That is the mean over random directions of (x - y)^2, where x and y have the same rank among
    their set's projections. Of the larger set, a random part as large as the other counts.
    """
    count, dim = min(len(a.features), len(b.features)), a.features.shape[1]
    generator = torch.Generator().manual_seed(DIRECTION_SEED)
    parts = []
    for features in (a.features, b.features):
        if len(features) > count:
            features = features[torch.randperm(len(features), generator=generator)[:count]]
        parts.append(features)
    directions = functional.normalize(torch.randn(DIRECTIONS, dim, generator=generator)).double()
    total = torch.zeros((), dtype=torch.float64)
    for some in directions.split(max(1, TOGETHER // count)):
        x, y = ((part.double() @ some.T).sort(dim=0).values for part in parts)
        total += (x - y).square().sum()
    return 3 * dim * total.item() / (count * DIRECTIONS)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.to(x.device).T / x.shape[1] + 1).pow(3)  # (n, m) float64
