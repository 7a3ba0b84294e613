"""Anything that draws images by ids and a seed, and the drawing of batches and grids."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffusion_lab.common.images import NotDrawn
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import progress_bar
from diffusion_lab.compute.distributed import (
    failing_together,
    gather_shards,
    rank_and_world,
    shard,
)

GRID_BATCH = 100  # samples of a grid that are drawn at once


class Generator(ABC):
    """Draws samples by ids and a seed; by default in one step and without classes."""

    @property
    def known(self) -> Labels | None:
        """The labels that samples are drawn of; a model knows examples of its training labels."""
        return None

    @property
    def conditional(self) -> bool:
        """Whether samples are drawn by class."""
        return self.known is not None

    @property
    def steps(self) -> int:
        """The number of steps in which samples are drawn."""
        return 1

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        """The class of each sample, (B,) int64; None for an unconditional model."""
        return None if self.known is None else self.known.in_turn(ids)

    def row_labels(self, columns: int) -> Tensor | None:
        """The labels of a grid's rows, or None for a square of `columns` rows without classes."""
        return None if self.known is None else self.known.grid(columns)

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[int],
        seed: int = 0,
        labels: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); `labels` (B,) replaces those of the ids.

        `on_step` is called after each step. The caller sets autocast.
        """
        return self.drawn(ids, seed, self.labels(ids) if labels is None else labels, on_step)

    @abstractmethod
    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        """The samples `ids` of these labels, uint8 (B, C, H, W), as `__call__` returns them."""


def draw(
    pipeline: Generator,
    ids: Sequence[int],
    batch_size: int,
    seed: int,
    labels: Tensor | None = None,
    description: str = "Drawing samples",
) -> Iterator[Tensor]:
    """Yields samples `ids` in batches, uint8 (b, C, H, W), with a progress bar over all steps.

    All ranks must call it; raises NotDrawn on all of them for samples that cannot be drawn.
    """
    starts = range(0, len(ids), batch_size)
    bar = progress_bar(description, len(starts) * pipeline.steps)
    with failing_together(NotDrawn), bar as advance:
        for start in starts:
            chosen = slice(start, start + batch_size)
            wanted = None if labels is None else labels[chosen]
            yield pipeline(ids[chosen], seed, wanted, advance)


def draw_rows(pipeline: Generator, columns: int, seed: int) -> Tensor:
    """Draws samples for a grid, uint8 (N, C, H, W): a row per class, or a square without classes.

    A row has `columns` samples of one label. Every rank draws its share and returns all samples.
    """
    of_rows = pipeline.row_labels(columns)
    rows = columns if of_rows is None else len(of_rows)
    ids = shard(rows * columns, *rank_and_world())
    labels = None if of_rows is None else of_rows[[i // columns for i in ids]]
    images = draw(pipeline, ids, GRID_BATCH, seed, labels, "Drawing the grid")
    return gather_shards(list(images))
