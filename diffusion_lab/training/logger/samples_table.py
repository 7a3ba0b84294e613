"""The table `samples`: a row a generated image, with what it was drawn from."""

from collections.abc import Sequence

import wandb
from PIL import Image

COLUMNS: list[str | int] = ["image", "class", "sample", "seed", "step", "images_seen"]
MOST_ROWS = 50  # each is a file, in every step with a grid


# the picture, the class unless the model is unconditional, the number in its seed, and the seed
Sample = tuple[Image.Image, str | None, int, int]


def chosen(count: int, columns: int) -> list[int]:
    """Which of `count` images in rows of `columns` have a row: all, or the first of each row."""
    by_column = sorted(range(count), key=lambda i: (i % columns, i // columns))
    return sorted(by_column[:MOST_ROWS])


def samples_table(samples: Sequence[Sample], step: int, images_seen: int) -> wandb.Table:
    """The samples of a step as W&B's table with `COLUMNS`."""
    rows = [[wandb.Image(image), *facts, step, images_seen] for image, *facts in samples]
    return wandb.Table(columns=COLUMNS, data=rows)
