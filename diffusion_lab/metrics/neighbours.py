"""Does a model copy its training images? Nearest neighbours, with held-out images as the measure.

n generated, m held-out and N training images, D features or pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.metrics.coverage import nearest
from diffusion_lab.metrics.metric import LOWER, Quantity

UNUSUAL = 0.01  # so few held-out images lie as near to a training image as a copy does
RELATIVE = 1 / 3  # of the distance to the second neighbour, at which the first was copied
MEANINGS = {
    # 0.5 if the model does not know which images are which, give or take the next value, which is
    # large where samples are few or alike
    "nearer_to_training": "samples nearer to training than to as many held-out images",
    "nearer_to_training_std": "what chance makes of 0.5 there",
    # the median; 1 likewise
    "distance_ratio": "distance to training by distance to as many held-out images",
    "copies": "samples nearer to training than all but 1 % of held-out images",
    # 1 without copies; blurred images have more
    "copy_ratio": "the same by what is expected, about 1 %",
    # arXiv:2310.02664
    "near_duplicates": "samples at under a third of the second neighbour's distance",
}
COPIES = Quantity(
    "copy_ratio", "Copies", "samples too near to a training image, by what is expected", LOWER
)
PIXEL_COPIES = Quantity(
    "pixel_copy_ratio", "Copies by pixels", "the same by distance of pixels", LOWER
)
SEED = 0  # of the choice of as many training as held-out images


@dataclass(frozen=True)
class Neighbours:
    """Distances, float64, to the nearest training images."""

    generated: Tensor  # (n, 2), of each generated image, from near to far
    index: Tensor  # (n, 2) int64, which they are
    held_out: Tensor  # (m,), of each held-out image
    pair: tuple[Tensor, Tensor]  # (n,) each: to the nearest of as many training as held-out images
    chance_std: float  # of the share nearer to the one side, if which is which were chance

    @classmethod
    def of(
        cls, generated: Sequence[Tensor], held_out: Sequence[Tensor], training: Tensor
    ) -> "Neighbours":
        """From features (N, D) of training images, N of at least 2, and of views of the others.

        Views, (n, D) or (m, D) each, are of the same images: as they are, and mirrored where the
        training images are; of an image the view counts that is the nearest.
        """
        distances, index = nearest_view(generated, training, 2)
        count = min(len(training), len(held_out[0]))
        generator = torch.Generator().manual_seed(SEED)
        found = [
            nearest_view(generated, side[torch.randperm(len(side), generator=generator)[:count]], 1)
            for side in (training, held_out[0])
        ]
        pair = (found[0][0][:, 0], found[1][0][:, 0])
        # an image of either side takes with it all samples that it is nearest to
        places = torch.where(pair[0] < pair[1], found[0][1][:, 0], count + found[1][1][:, 0])
        shares = places.bincount() / len(places)
        chance = 0.5 * shares.square().sum().sqrt().item()
        beside = nearest_view(held_out, training, 1)[0][:, 0]
        return cls(distances, index, beside, pair, chance)

    @property
    def relative(self) -> Tensor:
        """Distance to the nearest by distance to the second nearest training image, (n,)."""
        return self.generated[:, 0] / self.generated[:, 1].clamp(min=1e-12)

    def results(self) -> dict[str, float]:
        """What speaks for copying, by the names of `MEANINGS`."""
        training, held_out = self.pair
        nearer = (training < held_out).double() + 0.5 * (training == held_out).double()
        limit = self.held_out.quantile(UNUSUAL)
        copies = (self.generated[:, 0] < limit).double().mean().item()
        count = len(self.held_out)
        # the quantile lies between order statistics, of which the i-th has i / (count + 1) below it
        expected = (1 + UNUSUAL * (count - 1)) / (count + 1)
        return {
            "nearer_to_training": nearer.mean().item(),
            "nearer_to_training_std": self.chance_std,
            "distance_ratio": (training / held_out.clamp(min=1e-12)).median().item(),
            "copies": copies,
            "copy_ratio": copies / expected,
            "near_duplicates": (self.relative < RELATIVE).double().mean().item(),
        }


def nearest_view(views: Sequence[Tensor], others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `nearest`, for each image from the view, (n, D) each, that is nearest to one of others."""
    found = [nearest(view, others, count) for view in views]
    values, index = (torch.stack(part) for part in zip(*found, strict=True))  # (views, n, count)
    best = values[:, :, 0].argmin(0)
    images = torch.arange(len(best))
    return values[best, images], index[best, images]
