"""The table `samples`: a row a generated image, with what it was drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import wandb
from PIL import Image

COLUMNS: list[str | int] = ["image", "class", "sample", "seed", "step", "images_seen"]
MOST_ROWS = 50  # each is a file, in every step with a grid


@dataclass(frozen=True)
class Sample:
    """Sample `number` of `seed`, of a class unless the model is unconditional."""

    image: Image.Image
    label: str | None
    number: int
    seed: int


def chosen(count: int, columns: int) -> list[int]:
    """Which of `count` images in rows of `columns` have a row: all, or the first of each row."""
    by_column = sorted(range(count), key=lambda i: (i % columns, i // columns))
    return sorted(by_column[:MOST_ROWS])


def samples_table(samples: Sequence[Sample], step: int, images_seen: int) -> wandb.Table:
    """The samples of a step as W&B's table with `COLUMNS`."""
    rows = [
        [wandb.Image(each.image), each.label, each.number, each.seed, step, images_seen]
        for each in samples
    ]
    return wandb.Table(columns=COLUMNS, data=rows)
