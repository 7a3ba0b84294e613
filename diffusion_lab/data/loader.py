"""Loaders over one tensor, in memory or mapped: indexing it beats any worker pool.

The training stream is a pure function: its position p = 0, 1, ... holds image order(p // N)[p % N]
of N, where order(e) is the permutation of epoch e, drawn from (seed, e). So a run resumes exactly
where it stopped, on any number of ranks. B batch, C channels, H height, W width.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lab.common.images import pad_to
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import mix_seed
from diffusion_lab.data.augmentation import Augmentation, augment

FREE_MEMORY_SHARE = 0.1  # of a GPU's free memory, the most that images take if on_device is auto
AHEAD = 2  # batches that are gathered before they are asked for
ORDER = 0x6F72646572  # separates these draws from others with the same seed


@dataclass(frozen=True)
class Rows:
    """The images at `places` (n,) of a tensor (N, C, H, W), padded to `pad` pixels if given."""

    images: Tensor
    places: Tensor
    pad: int | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Tensor:
        """Copies some of the images, in the order of `index`."""
        images = self.images[self.places[index]]
        return pad_to(images, self.pad) if self.pad else images

    def batches(self, size: int) -> Iterator[Tensor]:
        """Copies all images in order, `size` at a time."""
        return (self[ids] for ids in torch.arange(len(self)).split(size))


class LabelledRows(NamedTuple):
    """Images, and their n labels, as in a `Split`."""

    images: Rows
    labels: Tensor


class Clean(NamedTuple):
    """The clean images or latents of a batch, for a step of a diffusion model.

    x0 (B, c, h, w) is clean, of about unit scale, and `eps` its noise if the batch has any. The
    images uint8 (B, C, H, W) that became it are known unless they were encoded before, with what
    the network is told of their augmentation.
    """

    x0: Tensor
    eps: Tensor | None = None
    images: Tensor | None = None
    augmentation: Tensor | None = None


class ImageBatch(NamedTuple):
    """Images uint8 (B, C, H, W) to train on, and labels int64 (B,), or float32 (B, K)."""

    images: Tensor
    labels: Tensor

    def encoded(self, first_stage: Any) -> Tensor:
        """The moments (B, ., h, w) of the images by a first stage."""
        return first_stage.moments(self.images)

    def clean(self, first_stage: Any, augmentation: Augmentation | None) -> Clean:
        """Augments the images, and encodes them with a first stage."""
        images, told = augment(augmentation, self.images)
        return Clean(first_stage.draw(first_stage.moments(images)), None, images, told)


class MomentBatch(NamedTuple):
    """Moments float32 (B, ., h, w) of images that a first stage has encoded, and labels (B,)."""

    moments: Tensor
    labels: Tensor

    def encoded(self, first_stage: Any) -> Tensor:
        """The moments (B, ., h, w), made before by the same first stage."""
        return self.moments

    def clean(self, first_stage: Any, augmentation: Augmentation | None) -> Clean:
        """Draws latents from the moments."""
        return Clean(first_stage.draw(self.moments))


class PairBatch(NamedTuple):
    """Samples of a teacher and their unit noise, float32 (B, 2c, h, w), and labels (B,)."""

    pairs: Tensor
    labels: Tensor

    def clean(self, first_stage: Any, augmentation: Augmentation | None) -> Clean:
        """Takes the samples and their noise apart."""
        return Clean(*self.pairs.chunk(2, 1))


Batch = ImageBatch | MomentBatch | PairBatch


@dataclass(frozen=True)
class EncodedImages:
    """The tensors that training uses instead of the training images, made once before it.

    These are (N, ., h, w) float32: moments of the images by a first stage, with `mirrored` for the
    images mirrored left to right, or other tensors with `labels` (N,) of their own.
    """

    moments: Tensor
    mirrored: Tensor | None = None
    labels: Tensor | None = None
    batch_type: type[MomentBatch] | type[PairBatch] = MomentBatch

    def stream(
        self, make: Callable[..., "TensorLoader"], labels: Tensor, flip: bool
    ) -> "TensorLoader":
        """Makes a stream of these tensors; labels (N,) and `flip` are those of encoded images."""
        encoded = self.labels is None
        return make(
            self.moments,
            labels if self.labels is None else self.labels,
            flip=flip and encoded,
            mirrored=self.mirrored,
            batch_type=self.batch_type,
        )


@dataclass(eq=False)
class TensorLoader:
    """An endless stream of shuffled batches on `device`, each a `batch_type` (ImageBatch, ...).

    Batch i of a rank holds the `batch_size` positions from samples_seen() + (i world + rank) B on;
    `samples_seen` is called whenever an iteration starts. With `flip`, half of the images, chosen
    by seed and position, are mirrored left to right, or taken from `mirrored`. `chosen` (N,) are
    indices of the images to use; without it, all are used. Images are padded to `pad` pixels if
    given. `on_device` says whether all images are kept on `device`; "auto" keeps them there if a
    GPU has memory for them. Of images that are not kept on a GPU, a thread gathers the next AHEAD
    batches while the GPU computes. With a `period`, the stream has the images of its first `period`
    positions again and again.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    seed: int
    flip: bool = False
    rank: int = 0
    world: int = 1
    samples_seen: Callable[[], int] = lambda: 0
    device: torch.device | str = "cpu"
    on_device: bool | str = "auto"
    mirrored: Tensor | None = None
    chosen: Tensor | None = None
    pad: int | None = None
    batch_type: type[Batch] = ImageBatch
    period: int | None = None

    def __post_init__(self) -> None:
        kept = [self.images] if self.mirrored is None else [self.images, self.mirrored]
        if self.on_device is True or (self.on_device == "auto" and fits(kept, self.device)):
            self.images, *mirrored = [each.to(self.device) for each in kept]
            self.mirrored = mirrored[0] if mirrored else None
        self.labels = self.labels.to(self.images.device)
        self._epoch, self._order = -1, torch.empty(0)  # the last permutation used

    @property
    def count(self) -> int:
        """The number N of images in an epoch."""
        return len(self.images if self.chosen is None else self.chosen)

    def __iter__(self) -> Iterator[Batch]:
        # a generator: nothing is read before the first batch is asked for
        first = self.samples_seen() + self.rank * self.batch_size
        starts = itertools.count(first, self.world * self.batch_size)
        if torch.device(self.device).type != "cuda" or self.images.device.type != "cpu":
            yield from map(self.batch_at, starts)  # without an end
        with ThreadPoolExecutor(1) as thread:
            gather = partial(self.gathered, pinned=True)
            ahead = deque(thread.submit(gather, start) for start in itertools.islice(starts, AHEAD))
            for start in starts:
                ahead.append(thread.submit(gather, start))
                yield self.finished(*ahead.popleft().result())

    def batch_at(self, start: int) -> Batch:
        """The batch at positions start, ..., start + batch_size - 1, on any rank."""
        return self.finished(*self.gathered(start))

    def gathered(self, start: int, pinned: bool = False) -> list[Tensor]:
        """A batch as it is stored: images, labels, and with `flip` what is to be mirrored.

        In pinned memory a GPU copies it while the host goes on.
        """
        if self.period:
            start %= self.period  # batches divide it
        count, stop = self.count, start + self.batch_size
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, count)
            pieces.append(self.order(epoch)[:, offset : offset + stop - start])
            start += pieces[-1].shape[1]
        index, mirrored = torch.cat(pieces, dim=1)  # (B,) each
        parts = [self.images[index], self.labels[index]]
        if self.flip:
            parts.append(mirrored.bool())
            parts += [] if self.mirrored is None else [self.mirrored[index]]
        return [each.pin_memory() for each in parts] if pinned else parts

    def finished(self, *parts: Tensor) -> Batch:
        """Moves what was gathered to the device, pads it, and mirrors half of it."""
        images, labels, *others = (each.to(self.device, non_blocking=True) for each in parts)
        if self.pad:  # not all at once, which would take as much memory again
            images = pad_to(images, self.pad)
        if self.flip:
            mirrored, *views = others
            flipped = views[0] if views else images.flip(-1)
            images = torch.where(mirrored[:, None, None, None], flipped, images)
        return self.batch_type(images, labels)

    def order(self, epoch: int) -> Tensor:
        """Returns (2, N) int64: the image indices in this epoch's order, and 1 where mirrored."""
        if epoch != self._epoch:
            # drawn on the CPU, so that every device sees the same order
            generator = torch.Generator().manual_seed(mix_seed(self.seed, ORDER, epoch))
            index = torch.randperm(self.count, generator=generator)
            mirrored = torch.randint(2, (self.count,), generator=generator)
            if self.chosen is not None:
                index = self.chosen[index]
            self._order = torch.stack([index, mirrored]).to(self.images.device)
            self._epoch = epoch
        return self._order


def fits(tensors: list[Tensor], device: torch.device | str) -> bool:
    """Whether the tensors leave enough of an accelerator's memory to the model."""
    if torch.device(device).type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(each.nbytes for each in tensors) < FREE_MEMORY_SHARE * free


class PassLoader:
    """A pass over validation or test images, as (images, labels, ids).

    Each rank has a range of the ids, which are the places of the images.
    All ranks have equally many batches, none of them empty, so that collective operations pair up;
    the last batch of a rank may be larger than `batch_size` by one.
    """

    def __init__(
        self, images: Tensor | Rows, labels: Tensor, batch_size: int, rank: int = 0, world: int = 1
    ):
        count = len(images)
        if count < world:
            raise UserError(
                f"{count} validation or test images are too few for {world} processes; write a "
                "larger data.validation_size, or data.validate_on"
            )
        self.images, self.labels = images, labels
        first, stop = rank * count // world, (rank + 1) * count // world
        # shares differ by one at most, so every rank counts batches by the smaller share
        starts = range(first, first + count // world, batch_size)
        self.bounds = [*starts, stop]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start, stop in itertools.pairwise(self.bounds):
            ids = torch.arange(start, stop)
            yield self.images[start:stop], self.labels[start:stop], ids
