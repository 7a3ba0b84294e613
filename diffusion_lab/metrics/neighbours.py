"""Nearest neighbours: what a set of images covers, and whether a model copies training images.

A set of images covers the balls around its features; each ball reaches to the k-th neighbour of
its centre in the set. n generated, m test and N training images, D features or pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.compute.distributed import gather_shards, rank_and_world, shard
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
        square_distances(rows, others).sqrt().topk(count, dim=1, largest=False)
        for rows in queries.split(block(others))
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def block(others: Tensor) -> int:
    """The number of queries that are compared with `others` at a time."""
    return max(1, PAIRS // len(others))


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared Euclidean distances of all pairs, (n, m) float64, of a (n, D) and b (m, D)."""
    a, b = a.double(), b.double()  # in float32 a copy would not be at distance 0
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each feature (n, D) to its `neighbours`-th neighbour in the set, (n,)."""
    return nearest(features, features, neighbours + 1)[0][:, -1]  # the first neighbour is itself


def covered_shares(generated: Tensor, real: Tensor) -> tuple[float, float, float, float]:
    """Precision, recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    Precision is the share of generated images that real ones cover, recall the share of real images
    that generated ones cover, with balls to the 3rd neighbour. Density, about 1 for real images, is
    the mean number of real images' balls that contain a generated image, divided by the number of
    neighbours; coverage is the share of real images whose ball contains a generated one, with balls
    to the 5th neighbour. The features are (n, D) and (m, D), of more than 5 images each.
    """
    known, _ = nearest(real, real, DENSITY_NEIGHBOURS + 1)  # the first neighbour is itself
    near, far = known[:, PRECISION_NEIGHBOURS], known[:, DENSITY_NEIGHBOURS]
    own = radii(generated, PRECISION_NEIGHBOURS)
    precise, balls = [], 0.0
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool, device=real.device)
    parts = (x.split(block(real)) for x in (generated, own))
    for rows, reach in zip(*parts, strict=True):
        between = square_distances(rows, real).sqrt()
        precise.append((between <= near).any(1))
        recalled |= (between <= reach[:, None]).any(0)
        inside = between < far
        balls += inside.sum().item()
        covered |= inside.any(0)
    found = (torch.cat(precise), recalled, covered)
    precision, recall, coverage = (each.double().mean().item() for each in found)
    return precision, recall, balls / (DENSITY_NEIGHBOURS * len(generated)), coverage


class Coverage(Metric):
    """Metrics by nearest neighbours, of equally many images on both sides, at most 10,000."""

    quantities = named("precision", "recall", "density", "coverage")

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
        values = covered_shares(*sides)
        return {q.name: value for q, value in zip(self.quantities, values, strict=True)}


UNUSUAL = 0.01  # share of test images that are as near to a training image as copies are
RELATIVE = 1 / 3  # share of the second neighbour's distance below which the first is a copy
MEANINGS = {
    # 0.5 if the model does not distinguish training from test images; the next value is the
    # standard deviation by chance, which is large if samples are few or similar
    "nearer_to_training": "share of samples nearer to training than to equally many test images",
    "nearer_to_training_std": "its standard deviation by chance",
    # the median over samples; 1 if the model does not distinguish training from test images
    "distance_ratio": "distance to training images over distance to equally many test images",
    "copies": "share of samples nearer to a training image than 99 % of test images",
    # 1 without copies; blurred images have more
    "copy_ratio": "the same, relative to the expected share of about 1 %",
    # arXiv:2310.02664
    "near_duplicates": "share of samples nearer than a third of the second neighbour's distance",
}
SEED = 0  # seed for choosing equally many training and test images


@dataclass(frozen=True)
class Neighbours:
    """The distances, float64, of generated and test images to their nearest training images."""

    generated: Tensor  # (n, 2), the two distances of each generated image, from near to far
    index: Tensor  # (n, 2) int64, the indices of those two training images
    test: Tensor  # (m,), the distance of each test image
    pair: tuple[Tensor, Tensor]  # (n,) each: distances to equally many training and test images
    chance_std: float  # std of the share nearer to one side, if the sides were assigned at random

    @classmethod
    def of(
        cls,
        generated: Sequence[Tensor],
        test: Sequence[Tensor],
        training: Tensor,
        sides: tuple[Tensor, Tensor],
    ) -> "Neighbours":
        """Computes distances from features (N, D) of N >= 2 training images and views of others.

        The views, (n, D) or (m, D) each, show the same images: unchanged, and mirrored if training
        images are mirrored; the nearest view of an image counts. `sides`, from `equal_sides`, are
        the training and the test images that a sample may be nearer to.
        """
        distances, index = nearest_view(generated, training, 2)
        count = len(sides[0])
        found = [
            nearest_view(generated, features[side].to(training.device), 1)
            for features, side in zip((training, test[0]), sides, strict=True)
        ]
        pair = (found[0][0][:, 0], found[1][0][:, 0])
        # all samples with the same nearest image change sides together
        places = torch.where(pair[0] < pair[1], found[0][1][:, 0], count + found[1][1][:, 0])
        shares = places.bincount() / len(places)
        chance = 0.5 * shares.square().sum().sqrt().item()
        beside = nearest_view(test, training, 1)[0][:, 0]
        return cls(distances, index, beside, pair, chance)

    @property
    def relative(self) -> Tensor:
        """The distance to the nearest training image over that to the second nearest, (n,)."""
        return relative_distance(self.generated)

    @property
    def limit(self) -> float:
        """The distance to a training image below which a sample counts as a copy."""
        return self.test.quantile(UNUSUAL).item()

    def results(self) -> dict[str, float]:
        """The evidence of copying, under the names in `MEANINGS`."""
        training, test = self.pair
        nearer = (training < test).double() + 0.5 * (training == test).double()
        found = detected(self.generated, self.limit)
        return {
            "nearer_to_training": nearer.mean().item(),
            "nearer_to_training_std": self.chance_std,
            "distance_ratio": (training / test.clamp(min=1e-12)).median().item(),
            "copies": found["copies"],
            "copy_ratio": found["copies"] / expected_share(len(self.test)),
            "near_duplicates": found["near_duplicates"],
        }


def relative_distance(distances: Tensor) -> Tensor:
    """The first over the second of the distances (n, 2) to the two nearest images, (n,)."""
    return distances[:, 0] / distances[:, 1].clamp(min=1e-12)


def detected(distances: Tensor, limit: float) -> dict[str, float]:
    """The shares of images that count as copies, under their names in `MEANINGS`.

    `distances` (n, 2) are those to the two nearest training images; a copy is nearer than `limit`.
    """
    return {
        "copies": (distances[:, 0] < limit).double().mean().item(),
        "near_duplicates": (relative_distance(distances) < RELATIVE).double().mean().item(),
    }


def expected_share(count: int) -> float:
    """The share of images below the limit by chance, if `count` images like them decide on it."""
    # the quantile lies between order statistics; below the i-th one expects i / (count + 1)
    return (1 + UNUSUAL * (count - 1)) / (count + 1)


def equal_sides(training: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses equally many images of each class on both sides, at random: their indices, (c,) each.

    The labels are (N,) and (m,) int64. With other shares of the classes on one side, samples would
    be nearer to the other side without a copy. Both are empty if no class is on both sides.
    """
    generator = torch.Generator().manual_seed(SEED)
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in training.unique():
        found = [(labels == label).nonzero().flatten() for labels in (training, test)]
        count = min(map(len, found))
        for side, index in zip(chosen, found, strict=True):
            side.append(index[torch.randperm(len(index), generator=generator)[:count]])
    return torch.cat(chosen[0]), torch.cat(chosen[1])


def nearest_view(views: Sequence[Tensor], others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Calls `nearest` for views (n, D) of the same images; keeps each image's nearest view.

    They are compared on the device of `others`, and returned on the CPU. All ranks call it
    together; each takes its share of the images, and returns all.
    """
    mine = shard(len(views[0]), *rank_and_world())
    found = [nearest(view[mine].to(others.device), others, count) for view in views]
    # (views, n, count)
    values, index = (torch.stack(part).cpu() for part in zip(*found, strict=True))
    best = values[:, :, 0].argmin(0)
    images = torch.arange(len(best))
    return gather_shards([values[best, images]]), gather_shards([index[best, images]])
