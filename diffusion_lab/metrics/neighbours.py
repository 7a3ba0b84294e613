"""Nearest neighbours that show whether a model copies training images, against test images.

n generated, m test and N training images, D features or pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.compute.distributed import gather_shards, rank_and_world, shard
from diffusion_lab.metrics.coverage import nearest

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
