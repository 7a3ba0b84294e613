"""Does a model copy its training images? Nearest neighbours, with held-out images as the measure.

n generated, m held-out and N training images, D features or pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.metrics.coverage import nearest

UNUSUAL = 0.01  # so few held-out images lie as near to a training image as a copy does
RELATIVE = 1 / 3  # of the distance to the second neighbour, at which the first was copied
SEED = 0  # of the choice of as many training as held-out images


@dataclass(frozen=True)
class Neighbours:
    """Distances, float64, to the nearest training images."""

    generated: Tensor  # (n, 2), of each generated image, from near to far
    index: Tensor  # (n, 2) int64, which they are
    held_out: Tensor  # (m,), of each held-out image
    pair: tuple[Tensor, Tensor]  # (n,) each: to the nearest of as many training as held-out images

    @classmethod
    def of(cls, generated: Tensor, held_out: Tensor, training: Tensor) -> "Neighbours":
        """From features (n, D), (m, D) and (N, D); N of at least 2."""
        distances, index = nearest(generated, training, 2)
        count = min(len(training), len(held_out))
        generator = torch.Generator().manual_seed(SEED)
        sides = (
            nearest(generated, side[torch.randperm(len(side), generator=generator)[:count]], 1)[0]
            for side in (training, held_out)
        )
        return cls(
            distances,
            index,
            nearest(held_out, training, 1)[0][:, 0],
            tuple(side[:, 0] for side in sides),
        )

    @property
    def relative(self) -> Tensor:
        """Distance to the nearest by distance to the second nearest training image, (n,)."""
        return self.generated[:, 0] / self.generated[:, 1].clamp(min=1e-12)

    def figures(self) -> dict[str, float]:
        """What speaks for copying, by name.

        nearer_to_training: the share of samples nearer to one of K training images than to any of
        K held-out ones; 0.5 if the model does not know which are which. distance_ratio: the median
        of the two distances' ratio; 1 likewise. copies: the share nearer to a training image than
        all but 1 % of held-out images are, copy_ratio: by that 1 %; 1 is expected, and blurred
        images have more. near_duplicates: the share at under a third of the distance of the second
        neighbour (arXiv:2310.02664).
        """
        training, held_out = self.pair
        nearer = (training < held_out).double() + 0.5 * (training == held_out).double()
        limit = self.held_out.quantile(UNUSUAL)
        copies = (self.generated[:, 0] < limit).double().mean().item()
        return {
            "nearer_to_training": nearer.mean().item(),
            "distance_ratio": (training / held_out.clamp(min=1e-12)).median().item(),
            "copies": copies,
            "copy_ratio": copies / UNUSUAL,
            "near_duplicates": (self.relative < RELATIVE).double().mean().item(),
        }
