"""Distances between two sets of images by their features, in float64.

The Frechet distance of N(m1, S1) and N(m2, S2) is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2).
With roots S1 = A^T A and S2 = B^T B, tr sqrt(S1 S2) is the sum of the singular values of A B^T:
exact also where a covariance is singular, and never complex. n images, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.common.messages import UserError

BLOCK = 2048  # rows that are held in float64 at a time
SPLIT_SEED = 0  # of the halves


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D), float64; n of at least 2."""
    count = len(features)
    mean = sum(block.double().sum(0) for block in features.split(BLOCK)) / count
    centred = (block.double() - mean for block in features.split(BLOCK))
    return mean, sum(block.T @ block for block in centred) / (count - 1)


def covariance_root(covariance: Tensor) -> Tensor:
    """A (D, D) with A^T A = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Between two Gaussians: means (D,), covariances (D, D), all float64 (arXiv:1706.08500)."""
    return _frechet(mean1, covariance_root(cov1), mean2, covariance_root(cov2))


def _frechet(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    overlap = torch.linalg.svdvals(root1 @ root2.T).sum()
    spread = root1.square().sum() + root2.square().sum() - 2 * overlap
    return ((mean1 - mean2).square().sum() + spread).clamp(min=0).item()


@dataclass(frozen=True)
class FeatureSet:
    """The features of one set of images, with what distances to others need of it."""

    features: Tensor  # (n, D) float32
    mean: Tensor  # (D,) float64
    root: Tensor  # (min(n, D), D) float64; root^T root is the unbiased covariance
    self_kernel: Tensor  # () float64; mean KID kernel over the pairs of different images

    @classmethod
    def of(cls, features: Tensor) -> "FeatureSet":
        """From features (n, D), n of at least 2; raises UserError for fewer or non-finite ones."""
        check_features(features)
        return cls(features, *_mean_and_root(features), _self_kernel(features))


def check_features(features: Tensor) -> None:
    """Raises UserError for fewer than 2 images, or for features (n, D) that are not finite."""
    count = len(features)
    if count < 2:
        raise UserError(f"a distance needs at least 2 images on each side, not {count}")
    if not (finite := features.isfinite().all(1)).all():
        raise UserError(
            f"{count - finite.sum()} of {count} images have features that are not finite "
            f"(the first is number {finite.int().argmin()}); "
            "look at the images, or load the extractor's weights anew"
        )


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """As in `FeatureSet`, of features (n, D)."""
    count, dim = features.shape
    if count > dim:
        mean, covariance = moments(features)
        return mean, covariance_root(covariance)
    mean = features.double().mean(0)
    return mean, (features.double() - mean) / (count - 1) ** 0.5


def frechet(a: FeatureSet, b: FeatureSet) -> float:
    """The Frechet distance of two feature sets (FID); biased upwards by about 1 / n."""
    return _frechet(a.mean, a.root, b.mean, b.root)


def frechets_of(features: Tensor, others: Sequence[Tensor]) -> list[float]:
    """As `frechet`, of features (n, D) and of each of others (m, D).

    Without the kernel means that `kid` wants, and the features' own moments are taken once.
    """
    for each in (features, *others):
        check_features(each)
    own = _mean_and_root(features)
    return [_frechet(*own, *_mean_and_root(other)) for other in others]


def frechet_of_halves(features: Tensor, other: FeatureSet, splits: int) -> Tensor:
    """Frechet distances to `other` of both halves of features (n, D), split at random: (2 splits,).

    Their standard deviation is the delete-half jackknife's estimate of that of the distance of all
    n: a conservative one, too large by a third to two thirds for Gaussian features. As bias falls
    as 1 / n, 2 `frechet` - their mean is without most of it (FID-infinity, arXiv:1911.07023), where
    n is several times D. Below D covariances are singular, bias falls otherwise, and that value is
    not valid: it may be far off, also negative.
    """
    half = len(features) // 2
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    values = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        for part in (order[:half], order[half : 2 * half]):
            values.append(_frechet(*_mean_and_root(features[part]), other.mean, other.root))
    return torch.tensor(values, dtype=torch.float64)


def kid(a: FeatureSet, b: FeatureSet) -> float:
    """Kernel distance: squared MMD with (x.y / D + 1)^3, unbiased, on all pairs (arXiv:1801.01401).

    It is about 0 for two sets of one distribution, and may be negative.
    """
    total = sum(
        _kernel(rows, columns).sum()
        for rows in a.features.split(BLOCK)
        for columns in b.features.split(BLOCK)
    )
    between = total / (len(a.features) * len(b.features))
    return (a.self_kernel + b.self_kernel - 2 * between).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1).pow(3)  # (n, m)


def _self_kernel(features: Tensor) -> Tensor:
    blocks = features.split(BLOCK)
    total = torch.zeros((), dtype=torch.float64)
    for i, rows in enumerate(blocks):
        within = _kernel(rows, rows)
        total += within.sum() - within.trace()
        total += 2 * sum(_kernel(rows, columns).sum() for columns in blocks[i + 1 :])
    return total / (len(features) * (len(features) - 1))
