"""Quality and variety by nearest neighbours: precision and recall, density and coverage.

A set of images covers the balls around its features; each ball reaches to the k-th neighbour of
its centre in the set. n images, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.observer import ImageSet
from diffusion_lab.metrics.quantity import named

PAIRS = 2**25  # pairs whose distances are held at a time, 256 MiB
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # k, as published
MOST = 10_000  # largest number of images per side, as published; all pairs are compared


def nearest(queries: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Finds the `count` nearest of `others` (m, D); returns distances and indices, (n, count) each.

    The distances are Euclidean, float64, from near to far; `count` is at most m.
    """
    others = others.double()
    found = [
        distances(rows, others).topk(count, dim=1, largest=False)
        for rows in queries.split(block(others))
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def block(others: Tensor) -> int:
    """The number of queries that are compared with `others` at a time."""
    return max(1, PAIRS // len(others))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """The Euclidean distances of all pairs, (n, m) float64, of a (n, D) and b (m, D)."""
    return square_distances(a, b).sqrt()


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared Euclidean distances of all pairs, (n, m) float64, of a (n, D) and b (m, D)."""
    a, b = a.double(), b.double()  # in float32 a copy would not be at distance 0
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each feature (n, D) to its `neighbours`-th neighbour in the set, (n,)."""
    return nearest(features, features, neighbours + 1)[0][:, -1]  # the first neighbour is itself


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991), in [0, 1], with 3 neighbours.

    Precision is the share of generated images that real ones cover, recall the share of real images
    that generated ones cover. The features are (n, D) and (m, D), of more than 3 images each.
    """
    real_radii, generated_radii = (radii(x, PRECISION_NEIGHBOURS) for x in (real, generated))
    within_real = []
    within_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    parts = (x.split(block(real)) for x in (generated, generated_radii))
    for rows, own in zip(*parts, strict=True):
        between = distances(rows, real)
        within_real.append((between <= real_radii).any(1))
        within_generated |= (between <= own[:, None]).any(0)
    return torch.cat(within_real).double().mean().item(), within_generated.double().mean().item()


def density_coverage(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Density, about 1 for real images, and coverage, in [0, 1] (arXiv:2002.09797); 5 neighbours.

    Density is the mean number of real images' balls that contain a generated image, divided by the
    number of neighbours; coverage is the share of real images whose ball contains a generated one.
    The features are (n, D) and (m, D), of more than 5 real images.
    """
    reach = radii(real, DENSITY_NEIGHBOURS)
    balls, covered = 0.0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in generated.split(block(real)):
        inside = distances(rows, real) < reach
        balls += inside.sum().item()
        covered |= inside.any(0)
    return balls / (DENSITY_NEIGHBOURS * len(generated)), covered.double().mean().item()


class Coverage(Metric):
    """A metric by nearest neighbours, of equally many images on both sides, at most 10,000."""

    shares: Callable[[Tensor, Tensor], tuple[float, float]]  # features -> values of `quantities`

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        count = min(len(generated), len(reference), MOST)
        if count <= DENSITY_NEIGHBOURS:
            return {}
        first = slice(count)
        return super().results(generated.select(first), reference.select(first), suffix)

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        sides = (
            each.features.to(generated.extractor.compares_on) for each in (generated, reference)
        )
        values = self.shares(*sides)
        return {q.name: value for q, value in zip(self.quantities, values, strict=True)}


class PrecisionRecall(Coverage):
    """Improved precision and recall (arXiv:1904.06991)."""

    quantities = named("precision", "recall")
    shares = staticmethod(precision_recall)


class DensityCoverage(Coverage):
    """Density and coverage (arXiv:2002.09797)."""

    quantities = named("density", "coverage")
    shares = staticmethod(density_coverage)
